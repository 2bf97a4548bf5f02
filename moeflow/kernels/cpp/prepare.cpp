// Activations in the order in which the kernels read them. The arithmetic is that of source/lay_out.cuh, bit for bit.
#include "numbers.hpp"
#include "shape.hpp"

namespace moeflow {
namespace {

constexpr float FULL_SCALE[] = {0.f, 127.f, 32639.f};   // by planes; 127 * 256 + 127: the high byte of all numbers fits
constexpr float TINY = 1e-30f;                          // activations below it count as zero
constexpr int WIDEST = 64;                              // columns of a chunk

void read(Number dtype, const void* x, int64_t at, int count, float* out) {
    if (dtype == FLOAT) memcpy(out, (const float*)x + at, (size_t)count * 4);
    else if (dtype == HALF)
        for (int i = 0; i < count; i++) out[i] = half_to_float(((const uint16_t*)x)[at + i]);
    else
        for (int i = 0; i < count; i++) out[i] = bfloat_to_float(((const uint16_t*)x)[at + i]);
}

// Numbers of one chunk in fixed point; returns the scale, not a number where one of them is none. By integers, which GCC
// vectorises: it keeps the order of a float's maximum.
float fix(const float* v, int count, int planes, int32_t* numbers) {
    constexpr int32_t INFINITE = 0x7F800000;
    int32_t largest_bits = 0, worst = 0;
    for (int i = 0; i < count; i++) {
        const int32_t magnitude = (int32_t)(as_bits(v[i]) & 0x7FFFFFFFu), counted = magnitude > INFINITE ? 0 : magnitude;
        worst = magnitude > worst ? magnitude : worst;
        largest_bits = counted > largest_bits ? counted : largest_bits;
    }
    const float largest = as_float((uint32_t)largest_bits);
    const float scale = largest > TINY ? largest / FULL_SCALE[planes] : 1.f;
    for (int i = 0; i < count; i++) {
        const float quotient = v[i] / scale;
        // Next to 1.5 * 2^23 a float's last place is one, so that the addition rounds to the nearest even.
        const int32_t rounded = (int32_t)(as_bits(quotient + 12582912.f) - 0x4B400000u);
        numbers[i] = quotient == quotient ? rounded : 0;
    }
    return worst < INFINITE ? scale : __builtin_nanf("");
}

// Where the numbers, scales and sums of one vector lie.
struct Target { int8_t* numbers; float *scales, *sums; };

// The bytes of a plane, in the order of columns, to its place among the words of a block.
template <int FIELDS> void lay_out_plane(const uint8_t* bytes, int step, int8_t* to) {
    for (int word = 0; word < 4; word++)
        for (int field = 0; field < FIELDS; field++) {
            const uint8_t* at = bytes + word * 4 * FIELDS + field;
            const uint32_t four = at[0] | (uint32_t)at[FIELDS] << 8 | (uint32_t)at[2 * FIELDS] << 16 |
                                  (uint32_t)at[3 * FIELDS] << 24;
            memcpy(to + (word * FIELDS + field) * step, &four, 4);
        }
}

void lay_out_chunk(const Shape& s, int planes, int64_t chunk, const int32_t* numbers, float scale, const Target& to) {
    const int64_t block = chunk / LANES;
    const int lane = (int)(chunk % 4) * 4 + (int)(chunk % LANES) / 4;
    to.scales[block * LANES + lane] = scale;
    int8_t* first = to.numbers + (block * 4 * s.fields * planes * LANES + lane) * 4;
    const int step = planes * LANES * 4;   // from a field to the next one
    uint8_t bytes[2][WIDEST];              // of planes; the low byte is what the high one leaves, with its sign
    for (int i = 0; i < s.chunk; i++) {
        bytes[0][i] = (uint8_t)(planes == 2 ? (numbers[i] + 128) >> 8 : numbers[i]);
        bytes[1][i] = (uint8_t)numbers[i];
    }
    const auto lay_out = s.fields == 4 ? lay_out_plane<4> : s.fields == 2 ? lay_out_plane<2> : lay_out_plane<1>;
    for (int plane = 0; plane < planes; plane++) lay_out(bytes[plane], step, first + plane * LANES * 4);
    const int unit = s.chunk / s.units;
    for (int u = 0; u < s.units; u++) {
        int32_t total = 0;
        for (int i = 0; i < unit; i++) total += numbers[u * unit + i];
        to.sums[(block * s.units + u) * LANES + lane] = (float)total;
    }
}

void codebook_order(const Matrix& matrix, Number dtype, const void* x, int64_t at, float* out) {
    for (int64_t first = 0; first < matrix.columns; first += 128) {
        float columns[128] = {};
        const int64_t rest = matrix.columns - first;
        read(dtype, x, at + first, rest < 128 ? (int)rest : 128, columns);
        for (int field = 0; field < 8; field++)
            for (int word = 0; word < 16; word++) out[first + field * 16 + word] = columns[word * 8 + field];
    }
}

}   // namespace

Sizes sizes_of(const Matrix& matrix, int32_t planes) {
    if (matrix.kind == PLAIN) return {matrix.columns * 4, 0, 0};
    if (matrix.kind == CODEBOOK) return {(matrix.columns + 127) / 128 * 512, 0, 0};
    const Shape s(matrix);
    return {s.blocks * 4 * s.fields * planes * LANES * 4, s.blocks * LANES, s.blocks * s.units * LANES};
}

void prepare(const Matrix& matrix, Number dtype, const void* x, int64_t x_stride, const Vectors& vectors) {
    if (matrix.kind == PLAIN) {
        for (int v = 0; v < vectors.count; v++)
            read(dtype, x, v * x_stride, (int)matrix.columns, (float*)((int8_t*)vectors.numbers + v * vectors.stride));
        return;
    }
    const Shape s(matrix);
    const Sizes sizes = sizes_of(matrix, vectors.planes);
    for (int v = 0; v < vectors.count; v++) {
        const Target to = {(int8_t*)vectors.numbers + v * vectors.stride, (float*)vectors.scales + v * sizes.scales,
                           (float*)vectors.sums + v * sizes.sums};
        if (matrix.kind == CODEBOOK) {
            codebook_order(matrix, dtype, x, v * x_stride, (float*)to.numbers);
            continue;
        }
        if (s.chunks % LANES) {   // what fills the last block up
            memset(to.numbers, 0, (size_t)sizes.numbers);
            memset(to.scales, 0, (size_t)sizes.scales * 4);
            memset(to.sums, 0, (size_t)sizes.sums * 4);
        }
        for (int64_t chunk = 0; chunk < s.chunks; chunk++) {
            float columns[WIDEST];
            int32_t numbers[WIDEST];
            read(dtype, x, v * x_stride + chunk * s.chunk, s.chunk, columns);
            const float scale = fix(columns, s.chunk, vectors.planes, numbers);
            lay_out_chunk(s, vectors.planes, chunk, numbers, scale, to);
        }
    }
}

}   // namespace moeflow
