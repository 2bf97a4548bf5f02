// 16 lanes as two vectors of AVX2, one part after the other: eight lanes' words are registers enough.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "matrix.hpp"

#define INLINED __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

namespace moeflow {
namespace {

using Ints = __m256i;
using Floats = __m256;
constexpr int WIDTH = 8, PARTS = 2;
constexpr int ROWS = 2;   // that are computed together
constexpr int MOST = 2;   // vectors that meet a block at once

inline Floats all(float v) { return _mm256_set1_ps(v); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load_halves(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Floats load_bfloats(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Ints load_ints(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fused_less(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }   // c - a * b
inline Ints flip_signs(Ints v) { return _mm256_xor_si256(v, _mm256_set1_epi8((char)0x80)); }
inline Ints less_128_times(Ints dot, Floats sum) { return _mm256_sub_epi32(dot, _mm256_slli_epi32(_mm256_cvtps_epi32(sum), 7)); }

template <int SHIFT, int MASK> inline Ints bits_of(Ints v) {
    return _mm256_and_si256(SHIFT ? _mm256_srli_epi32(v, SHIFT) : v, _mm256_set1_epi32(MASK));
}
// Two bits from LOW on of each byte, and above them one bit of `high`, from HIGH on.
template <int LOW, int HIGH> inline Ints joined(Ints low, Ints high) {
    const Ints third = HIGH < 2 ? _mm256_slli_epi32(high, 2 - HIGH) : _mm256_srli_epi32(high, HIGH < 2 ? 0 : HIGH - 2);
    return _mm256_or_si256(bits_of<LOW, 0x03030303>(low), _mm256_and_si256(third, _mm256_set1_epi32(0x04040404)));
}

// The chunk of each lane of a part.
inline Ints lane_chunks(int part) {
    return _mm256_add_epi32(_mm256_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13), _mm256_set1_epi32(2 * part));
}
// Which lanes count: those of the first `count` chunks. A codebook's have four words a chunk.
struct There {
    Floats lanes[PARTS];
    There(int kind, int count) {
        for (int part = 0; part < PARTS; part++) {
            const Ints words = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
            const Ints chunks = kind == CODEBOOK ? _mm256_add_epi32(words, _mm256_set1_epi32(2 * part)) : lane_chunks(part);
            lanes[part] = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), chunks));
        }
    }
};
// Where a lane does not count, `a` may be anything, and `b` is finite.
inline Floats fused_there(const There& there, int part, Floats a, Floats b, Floats c) {
    return fused(_mm256_and_ps(a, there.lanes[part]), b, c);
}

inline __m128i load_16(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
inline __m128i load_8(const uint8_t* p) { return _mm_loadl_epi64((const __m128i*)p); }
inline __m128i load_4(const uint8_t* p) { int v; memcpy(&v, p, 4); return _mm_cvtsi32_si128(v); }

// N integers a chunk, in the order of chunks, to the order of lanes: chunks 4 * j + 2 * part for j = 0 to 3, then those behind
// each of them.
template <int N> inline void take(const uint8_t* p, int part, Ints* out) {
    if constexpr (N == 4) {
        const uint8_t* first = p + 32 * part;
        const Ints a = load_ints(first), b = load_ints(first + 64), c = load_ints(first + 128), d = load_ints(first + 192);
        const Ints ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
        const Ints ab2 = _mm256_unpackhi_epi32(a, b), cd2 = _mm256_unpackhi_epi32(c, d);
        out[0] = _mm256_unpacklo_epi64(ab, cd);
        out[1] = _mm256_unpackhi_epi64(ab, cd);
        out[2] = _mm256_unpacklo_epi64(ab2, cd2);
        out[3] = _mm256_unpackhi_epi64(ab2, cd2);
    } else if constexpr (N == 2) {
        const uint8_t* first = p + 16 * part;
        const __m128i a = load_16(first), b = load_16(first + 32), c = load_16(first + 64), d = load_16(first + 96);
        const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
        const __m128i ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
        out[0] = _mm256_set_m128i(_mm_unpacklo_epi64(ab2, cd2), _mm_unpacklo_epi64(ab, cd));
        out[1] = _mm256_set_m128i(_mm_unpackhi_epi64(ab2, cd2), _mm_unpackhi_epi64(ab, cd));
    } else {
        const uint8_t* first = p + 8 * part;
        const __m128i ab = _mm_unpacklo_epi32(load_8(first), load_8(first + 16));
        const __m128i cd = _mm_unpacklo_epi32(load_8(first + 32), load_8(first + 48));
        out[0] = _mm256_set_m128i(_mm_unpackhi_epi64(ab, cd), _mm_unpacklo_epi64(ab, cd));
    }
}
// 16 bits a chunk.
inline Ints take_shorts(const uint8_t* p, int part) {
    const uint8_t* first = p + 4 * part;
    const __m128i ab = _mm_unpacklo_epi16(load_4(first), load_4(first + 8));
    const __m128i cd = _mm_unpacklo_epi16(load_4(first + 16), load_4(first + 24));
    return _mm256_cvtepu16_epi32(_mm_unpacklo_epi32(ab, cd));
}

// Where lanes find what `ratio` chunks share: one of eight, or fewer.
struct Spread {
    Ints lanes[PARTS];
    explicit Spread(int ratio) {
        int shift = 0;
        while (1 << shift < ratio) shift++;
        for (int part = 0; part < PARTS; part++)
            lanes[part] = _mm256_srl_epi32(lane_chunks(part), _mm_cvtsi32_si128(shift));
    }
};
// A scale and a zero a lane.
inline void widen(Ints pairs, Floats& scale, Floats& zero) {
    const Ints order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,
                                        0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const Ints halves = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(pairs, order), 0xD8);
    scale = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    zero = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}
inline void spread_half_pairs(const Spread& spread, const uint8_t* p, int count, int part, Floats& scale, Floats& zero) {
    const Ints mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    widen(_mm256_permutevar8x32_epi32(_mm256_maskload_epi32((const int*)p, mask), spread.lanes[part]), scale, zero);
}
// Steps lie behind these codes in the blob, 16 bytes or more, so that a vector can be read wherever one begins.
inline Ints spread_shorts(const Spread& spread, const uint8_t* p, int, int part) {
    return _mm256_permutevar8x32_epi32(_mm256_cvtepu16_epi32(load_16(p)), spread.lanes[part]);
}
// UNITS pairs of halves a chunk, scale and zero, to a vector of scales and one of zeros for each unit.
template <int UNITS> inline void half_pairs(const uint8_t* p, int part, Floats* scale, Floats* zero) {
    Ints pairs[UNITS];
    take<UNITS>(p, part, pairs);
    for (int u = 0; u < UNITS; u++) widen(pairs[u], scale[u], zero[u]);
}

// For CODEBOOK: a scale for each half of the lanes, and numbers by the codes' low four bits.
inline Floats half_scales(const uint8_t* p, int part) {
    uint16_t half;
    memcpy(&half, p + 2 * part, 2);
    return _mm256_cvtph_ps(_mm_set1_epi16((short)half));
}
struct Table {
    Floats low, high;
    explicit Table(const float* p) : low(load(p)), high(load(p + 8)) {}
};
inline Floats looked_up(const Table& table, Ints codes) {   // a permutation takes three bits, the blend the fourth
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, codes), _mm256_permutevar8x32_ps(table.high, codes),
                            _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}

// Products of four codes with four numbers in each lane, summed exactly, for each of the numbers' planes.
//
// In 16 bits: pairs of products with codes of up to 4 bits stay below 3,840, and a chunk has at most 8 of them for each
// lane (of 3 bits 16 below 1,792). Codes of 8 bits are taken by halves.
template <int BITS, int PLANES> struct Dots {
    static constexpr int HALVES = BITS == 8 ? 2 : 1;
    Ints sums[HALVES][PLANES];
    INLINED void clear() {
        for (int h = 0; h < HALVES; h++)
            for (int i = 0; i < PLANES; i++) sums[h][i] = _mm256_setzero_si256();
    }
    INLINED void add(Ints codes, const uint8_t* numbers) {
        const Ints low = BITS == 8 ? bits_of<0, 0x0F0F0F0F>(codes) : codes, high = bits_of<4, 0x0F0F0F0F>(codes);
        for (int i = 0; i < PLANES; i++) {
            const Ints x = load_ints(numbers + 64 * i);
            for (int h = 0; h < HALVES; h++) sums[h][i] = _mm256_add_epi16(sums[h][i], _mm256_maddubs_epi16(h ? high : low, x));
        }
    }
    INLINED Ints sum() const {
        Ints out = _mm256_setzero_si256();
        for (int h = 0; h < HALVES; h++)
            for (int i = 0; i < PLANES; i++) {
                const int weight = (h ? 16 : 1) * (i + 1 < PLANES ? 256 : 1);
                out = _mm256_add_epi32(out, _mm256_madd_epi16(sums[h][i], _mm256_set1_epi16((short)weight)));
            }
        return out;
    }
};

// The sum of 32 chunks in the order of a warp's: chunks 16 apart, then 8, 4, 2 and 1.
inline float total(const Floats (&even)[PARTS], const Floats (&odd)[PARTS]) {
    Floats low = _mm256_add_ps(even[0], odd[0]), high = _mm256_add_ps(even[1], odd[1]);
    low = _mm256_add_ps(low, _mm256_permute_ps(low, 0x4E));
    high = _mm256_add_ps(high, _mm256_permute_ps(high, 0x4E));
    low = _mm256_add_ps(low, _mm256_permute_ps(low, 0xB1));
    high = _mm256_add_ps(high, _mm256_permute_ps(high, 0xB1));
    const Floats both = _mm256_add_ps(low, high);
    return _mm_cvtss_f32(_mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}

}   // namespace
}   // namespace moeflow
