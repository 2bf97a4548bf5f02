// Rows of plain 16-bit numbers times a few vectors of float32, in terms of a level's vectors (vectors_*.hpp, included before).
//
// Weights are exact in float32. Lane `l` sums columns l, l + 16, .. in two accumulators in turns, and `total` adds lanes as it
// does for packed rows: every level gives the same bits.
#pragma once
#include "block.hpp"

namespace moeflow {
namespace {

constexpr int STEP = 2 * LANES;   // columns at a time: 64 bytes

template <Number DTYPE, int COUNT> void some_plain_rows(const Job& job, const Common&, int64_t row, int first) {
    const Matrix& matrix = *job.matrix;
    const int64_t row_bytes = matrix.columns * 2, ahead = ROWS * (1 + AHEAD / (ROWS * row_bytes)) * row_bytes;
    const uint8_t* rows[ROWS];
    int64_t index[ROWS];
    for (int r = 0; r < ROWS; r++) {
        index[r] = row + r < job.end ? row + r : job.end - 1;
        rows[r] = job.blob + matrix.words + index[r] * row_bytes;
    }
    const float* x[COUNT];
    for (int v = 0; v < COUNT; v++) x[v] = (const float*)((const uint8_t*)job.vectors->numbers + (first + v) * job.vectors->stride);
    Floats sums[2][ROWS][COUNT][PARTS];
    UNROLLED for (int turn = 0; turn < 2; turn++)
        UNROLLED for (int r = 0; r < ROWS; r++)
            UNROLLED for (int v = 0; v < COUNT; v++)
                UNROLLED for (int part = 0; part < PARTS; part++) sums[turn][r][v][part] = all(0.f);
    for (int64_t column = 0; column < matrix.columns; column += STEP) {
        UNROLLED for (int r = 0; r < ROWS; r++) __builtin_prefetch(rows[r] + column * 2 + ahead, 0, 2);
        UNROLLED for (int turn = 0; turn < 2; turn++)
            UNROLLED for (int part = 0; part < PARTS; part++) {
                const int64_t at = column + turn * LANES + part * WIDTH;
                UNROLLED for (int r = 0; r < ROWS; r++) {
                    const Floats weights = DTYPE == HALF ? load_halves(rows[r] + at * 2) : load_bfloats(rows[r] + at * 2);
                    UNROLLED for (int v = 0; v < COUNT; v++)
                        sums[turn][r][v][part] = fused(weights, load(x[v] + at), sums[turn][r][v][part]);
                }
            }
    }
    UNROLLED for (int r = 0; r < ROWS; r++)
        UNROLLED for (int v = 0; v < COUNT; v++) {
            float sum = total(sums[0][r][v], sums[1][r][v]);
            if (matrix.bias >= 0) sum += ((const float*)(job.blob + matrix.bias))[index[r]];
            job.out[(first + v) * matrix.rows + index[r]] = sum;
        }
}

}   // namespace
}   // namespace moeflow
