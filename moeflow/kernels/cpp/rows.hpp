// Products of a packed matrix's rows with any number of vectors, block by block: which blocks a row has, what is summed in
// which order, and which kernel a format gets. More vectors than meet a block at once meet a row again while it is in the
// nearest cache. No memory is asked for and nothing is thrown.
//
// Lane `l` of the two accumulators holds the sums of two of a warp's lanes: blocks go to them in turns.
#pragma once
#include <cstring>

#include "block.hpp"
#include "plain.hpp"

namespace moeflow {
namespace {

// A row's last block in memory of its own, where behind it there may be nothing to read.
struct Padded { alignas(64) uint8_t words[LANES * 16], high[LANES * 8], scales[LANES * 16]; };

__attribute__((noinline, cold)) void pad(const Matrix& matrix, const Common& m, Row row, Padded& to) {
    memset(&to, 0, sizeof to);
    const int64_t first = m.full * block_chunks(matrix.kind), scales = m.full * m.block_scales;
    memcpy(to.words, row.words + first * 16, (size_t)m.rest * 16);
    if (matrix.bits == 3) memcpy(to.high, row.high + first * 8, (size_t)m.rest * 8);
    if (matrix.kind != SIGNED) memcpy(to.scales, row.scales + scales, (size_t)(m.row_scales - scales));
}

// ROWS rows from `row` on times COUNT vectors from `first` on; beyond the job's last row that one is computed again.
template <class T, int COUNT> void some_rows(const Job& job, const Common& m, int64_t row, int first) {
    const Matrix& matrix = *job.matrix;
    const Vectors& given = *job.vectors;
    Row rows[ROWS];
    Padded copies[ROWS];
    int64_t index[ROWS];
    for (int r = 0; r < ROWS; r++) {
        index[r] = row + r < job.end ? row + r : job.end - 1;
        rows[r].words = job.blob + matrix.words + index[r] * m.chunks * 16;
        rows[r].high = job.blob + matrix.high + index[r] * m.chunks * 8;
        rows[r].scales = job.blob + matrix.scales + index[r] * m.row_scales;
        rows[r].steps = (const float*)(job.blob + matrix.steps + index[r] * m.row_steps);
    }
    const int64_t lanes = m.blocks * LANES;   // not for a codebook, which reads neither scales nor sums
    const Activations x = {(const uint8_t*)given.numbers + first * given.stride, given.scales + first * lanes,
                           given.sums + first * lanes * T::UNITS, given.stride, lanes, lanes * T::UNITS};
    Floats sums[ROWS][COUNT][PARTS], others[ROWS][COUNT][PARTS];   // of this block's turn, and of the next one's
    UNROLLED for (int r = 0; r < ROWS; r++)
        UNROLLED for (int v = 0; v < COUNT; v++)
            UNROLLED for (int part = 0; part < PARTS; part++) sums[r][v][part] = others[r][v][part] = all(0.f);
    There there(T::KIND, block_chunks(T::KIND));
    for (int64_t block = 0, place = 0; block < m.blocks; place = ++block) {
        if (block == m.full) {
            there = There(T::KIND, m.rest);
            if (index[ROWS - 1] >= m.careful) {
                UNROLLED for (int r = 0; r < ROWS; r++) {
                    pad(matrix, m, rows[r], copies[r]);
                    rows[r] = {copies[r].words, copies[r].high, copies[r].scales, rows[r].steps};
                }
                place = 0;
            }
        }
        add_block<T, COUNT>(m, rows, x, block, place, there, sums);
        UNROLLED for (int r = 0; r < ROWS; r++)
            UNROLLED for (int v = 0; v < COUNT; v++)
                UNROLLED for (int part = 0; part < PARTS; part++) std::swap(sums[r][v][part], others[r][v][part]);
    }
    UNROLLED for (int r = 0; r < ROWS; r++)
        UNROLLED for (int v = 0; v < COUNT; v++) {
            float sum = total(sums[r][v], others[r][v]);
            if constexpr (T::KIND == SIGNED) sum *= ((const float*)(job.blob + matrix.scales))[index[r]];
            if (matrix.bias >= 0) sum += ((const float*)(job.blob + matrix.bias))[index[r]];
            job.out[(first + v) * matrix.rows + index[r]] = sum;
        }
}

// All rows of a job, two vectors at a time where there is a `pair`.
using Some = void (*)(const Job& job, const Common& m, int64_t row, int first);
__attribute__((noinline)) void multiply_all(const Job& job, Some pair, Some single) {
    const Common m(*job.matrix, Shape(*job.matrix));
    const int count = job.vectors->count;
    for (int64_t row = job.begin; row < job.end; row += ROWS) {
        int v = 0;
        if (pair)
            for (; v + 2 <= count; v += 2) pair(job, m, row, v);
        for (; v < count; v++) single(job, m, row, v);
    }
}

template <class T> void multiply(const Job& job) {
    if constexpr (MOST >= 2 && T::PLANES == 2) multiply_all(job, some_rows<T, 2>, some_rows<T, 1>);
    else multiply_all(job, nullptr, some_rows<T, 1>);
}

template <Number DTYPE> void multiply_plain(const Job& job) {
    multiply_all(job, MOST >= 2 ? some_plain_rows<DTYPE, 2> : nullptr, some_plain_rows<DTYPE, 1>);
}

template <int BITS, int PLANES> Multiply affine_of(int units) {
    constexpr int most = 8 / code_bits(BITS);   // groups of 16
    if (units == 1) return multiply<Form<AFFINE, BITS, 1, PLANES>>;
    if constexpr (most >= 2)
        if (units == 2) return multiply<Form<AFFINE, BITS, 2, PLANES>>;
    if constexpr (most >= 4)
        if (units == 4) return multiply<Form<AFFINE, BITS, 4, PLANES>>;
    return nullptr;
}

template <int PLANES> Multiply kernel_of(const Matrix& m) {
    if (m.kind == PLAIN) return m.bits != 16 || m.columns % STEP ? nullptr : m.meta == HALF ? multiply_plain<HALF> : multiply_plain<BFLOAT>;
    const int units = Shape(m).units;
    if (m.kind == SIGNED) return multiply<Form<SIGNED, 8, 1, PLANES>>;
    if (m.kind == CODEBOOK) return multiply<Form<CODEBOOK, 4, 1, 2>>;   // without planes
    if (m.kind != AFFINE) return nullptr;
    if (m.bits == 2) return affine_of<2, PLANES>(units);
    if (m.bits == 3) return affine_of<3, PLANES>(units);
    if (m.bits == 4) return affine_of<4, PLANES>(units);
    if (m.bits == 8) return affine_of<8, PLANES>(units);
    return nullptr;
}

inline Multiply kernel_of(const Matrix& m, int planes) { return planes == 1 ? kernel_of<1>(m) : planes == 2 ? kernel_of<2>(m) : nullptr; }

}   // namespace
}   // namespace moeflow
