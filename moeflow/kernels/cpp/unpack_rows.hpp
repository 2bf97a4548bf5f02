// Rows of a packed matrix as plain numbers, eight columns at a time (eight_*.hpp, included before). The arithmetic is that of
// kernels/dequantize.py: float32, one operation after the other, rounded once to the wanted type. Scales go by groups of
// 16 columns or more, so that eight have the same.
#pragma once
#include "codebook.hpp"
#include "numbers.hpp"
#include "shape.hpp"

namespace moeflow {
namespace {

struct Factors { float scale, zero; };

template <int KIND> inline Factors factors_of(const Matrix& m, const Shape& s, const uint8_t* blob, int64_t row, int64_t group) {
    const int64_t at = row * s.groups + group;
    if (KIND == SIGNED) return {((const float*)(blob + m.scales))[row], 0.f};
    if (KIND == CODEBOOK) return {half_to_float(((const uint16_t*)(blob + m.scales))[at]), 0.f};
    if (m.meta == 8) {
        const uint8_t* codes = blob + m.scales + 2 * at;
        const float* steps = (const float*)(blob + m.steps) + (row * ((s.groups + 127) / 128) + group / 128) * 4;
        return {(float)codes[0] * steps[0] + steps[1], (float)codes[1] * steps[2] + steps[3]};
    }
    const uint16_t* pair = (const uint16_t*)(blob + m.scales) + 2 * at;
    return {half_to_float(pair[0]), half_to_float(pair[1])};
}

// Columns 8 * piece to 8 * piece + 7 of a row whose words, and third bits, begin there.
template <int KIND, int BITS> inline Eight numbers_of(const uint8_t* words, const uint32_t* high, int64_t piece) {
    if constexpr (KIND == SIGNED) return signed_bytes(words + 8 * piece);
    else if constexpr (BITS == 8) return unsigned_bytes(words + 8 * piece);
    else if constexpr (KIND == CODEBOOK) return looked_up(((const uint32_t*)words)[piece], NF4);
    else if constexpr (BITS == 4) return fields<4>(((const uint32_t*)words)[piece]);
    else if constexpr (BITS == 2) return fields<2>(((const uint16_t*)words)[piece]);
    else return fields_3(((const uint16_t*)words)[piece], high[piece / 4] >> (piece % 2 * 16 + piece % 4 / 2 * 4));
}

template <int KIND, int BITS, Number DTYPE>
void unpack_rows(const Matrix& m, const uint8_t* blob, void* out, int64_t begin, int64_t end) {
    const Shape s(m);
    const int64_t pieces = m.columns / 8, shared = KIND == SIGNED ? pieces : m.group / 8;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t* words = blob + m.words + row * m.columns / 8 * code_bits(BITS);
        const uint32_t* high = (const uint32_t*)(blob + m.high) + row * (m.columns / 32);
        uint8_t* to = (uint8_t*)out + row * m.columns * (DTYPE == FLOAT ? 4 : 2);
        for (int64_t first = 0; first < pieces; first += shared) {
            const Factors f = factors_of<KIND>(m, s, blob, row, first / shared);
            for (int64_t piece = first; piece < first + shared; piece++) {
                const Eight codes = numbers_of<KIND, BITS>(words, high, piece);
                store<DTYPE>(to, piece, times(KIND == AFFINE ? minus(codes, f.zero) : codes, f.scale));
            }
        }
    }
}

template <int KIND, int BITS> inline void unpack_as(const Matrix& m, const uint8_t* blob, Number dtype, void* out, int64_t begin, int64_t end) {
    if (dtype == FLOAT) unpack_rows<KIND, BITS, FLOAT>(m, blob, out, begin, end);
    else if (dtype == HALF) unpack_rows<KIND, BITS, HALF>(m, blob, out, begin, end);
    else unpack_rows<KIND, BITS, BFLOAT>(m, blob, out, begin, end);
}

inline void unpack_any(const Matrix& m, const uint8_t* blob, Number dtype, void* out, int64_t begin, int64_t end) {
    if (m.kind == SIGNED) unpack_as<SIGNED, 8>(m, blob, dtype, out, begin, end);
    else if (m.kind == CODEBOOK) unpack_as<CODEBOOK, 4>(m, blob, dtype, out, begin, end);
    else if (m.bits == 2) unpack_as<AFFINE, 2>(m, blob, dtype, out, begin, end);
    else if (m.bits == 3) unpack_as<AFFINE, 3>(m, blob, dtype, out, begin, end);
    else if (m.bits == 4) unpack_as<AFFINE, 4>(m, blob, dtype, out, begin, end);
    else unpack_as<AFFINE, 8>(m, blob, dtype, out, begin, end);
}

}   // namespace
}   // namespace moeflow
