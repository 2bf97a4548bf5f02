// 16 lanes as one vector of AVX-512 (F, BW, VL, DQ), with VNNI where the unit is compiled for it.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "matrix.hpp"

#define INLINED __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

namespace moeflow {
namespace {

using Ints = __m512i;
using Floats = __m512;
constexpr int WIDTH = 16, PARTS = 1;
constexpr int ROWS = 2;   // that are computed together
constexpr int MOST = 2;   // vectors that meet a block at once

inline Floats all(float v) { return _mm512_set1_ps(v); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load_halves(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Floats load_bfloats(const uint8_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fused_less(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }   // c - a * b
inline Ints flip_signs(Ints v) { return _mm512_xor_si512(v, _mm512_set1_epi8((char)0x80)); }
inline Ints less_128_times(Ints dot, Floats sum) { return _mm512_sub_epi32(dot, _mm512_slli_epi32(_mm512_cvtps_epi32(sum), 7)); }

template <int SHIFT, int MASK> inline Ints bits_of(Ints v) {
    return _mm512_and_si512(SHIFT ? _mm512_srli_epi32(v, SHIFT) : v, _mm512_set1_epi32(MASK));
}
// Two bits from LOW on of each byte, and above them one bit of `high`, from HIGH on.
template <int LOW, int HIGH> inline Ints joined(Ints low, Ints high) {
    const Ints two = LOW ? _mm512_srli_epi32(low, LOW) : low;
    const Ints third = HIGH < 2 ? _mm512_slli_epi32(high, 2 - HIGH) : _mm512_srli_epi32(high, HIGH < 2 ? 0 : HIGH - 2);
    const Ints both = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x03030303), two, third, 0xCA);   // mask ? two : third
    return _mm512_and_si512(both, _mm512_set1_epi32(0x07070707));
}

// The chunk of each lane, times a factor.
inline Ints lane_chunks(int factor, int plus) {
    const Ints chunks = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_add_epi32(_mm512_mullo_epi32(chunks, _mm512_set1_epi32(factor)), _mm512_set1_epi32(plus));
}

// Which lanes count: those of the first `count` chunks. A codebook's have four words a chunk.
struct There {
    __mmask16 lanes;
    There(int kind, int count)
        : lanes(kind == CODEBOOK ? (__mmask16)((1u << 4 * count) - 1)
                                 : _mm512_cmplt_epi32_mask(lane_chunks(1, 0), _mm512_set1_epi32(count))) {}
};
inline Floats fused_there(const There& there, int, Floats a, Floats b, Floats c) {
    return _mm512_mask3_fmadd_ps(a, b, c, there.lanes);
}

// N integers a chunk, in the order of chunks, to the order of lanes.
template <int N> inline void take(const uint8_t* p, int, Ints* out) {
    const Ints a = load_ints(p);
    if constexpr (N == 1) {
        out[0] = _mm512_permutexvar_epi32(lane_chunks(1, 0), a);
        return;
    }
    const Ints b = load_ints(p + 64);
    if constexpr (N == 2) {
        for (int i = 0; i < 2; i++) out[i] = _mm512_permutex2var_epi32(a, lane_chunks(2, i), b);
    } else if constexpr (N == 4) {
        const Ints c = load_ints(p + 128), d = load_ints(p + 192);
        const Ints ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
        const Ints ab2 = _mm512_unpackhi_epi32(a, b), cd2 = _mm512_unpackhi_epi32(c, d);
        out[0] = _mm512_unpacklo_epi64(ab, cd);
        out[1] = _mm512_unpackhi_epi64(ab, cd);
        out[2] = _mm512_unpacklo_epi64(ab2, cd2);
        out[3] = _mm512_unpackhi_epi64(ab2, cd2);
    }
}
// 16 bits a chunk.
inline Ints take_shorts(const uint8_t* p, int) {
    return _mm512_permutexvar_epi32(lane_chunks(1, 0), _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)));
}

// Where lanes find what `ratio` chunks share.
struct Spread {
    Ints lanes, halves;
    explicit Spread(int ratio) {
        int shift = 0;
        while (1 << shift < ratio) shift++;
        lanes = _mm512_srli_epi32(lane_chunks(1, 0), shift);
        const __m256i low = _mm512_cvtepi32_epi16(_mm512_slli_epi32(lanes, 1));
        halves = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_add_epi16(low, _mm256_set1_epi16(1)), 1);
    }
};
// 16 scales and 16 zeros.
inline void widen(Ints halves, Floats& scale, Floats& zero) {
    scale = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    zero = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}
inline void spread_half_pairs(const Spread& spread, const uint8_t* p, int count, int, Floats& scale, Floats& zero) {
    widen(_mm512_permutexvar_epi16(spread.halves, _mm512_maskz_loadu_epi32((1u << count) - 1, p)), scale, zero);
}
inline Ints spread_shorts(const Spread& spread, const uint8_t* p, int count, int) {
    return _mm512_permutexvar_epi32(spread.lanes, _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1u << count) - 1, p)));
}
// UNITS pairs of halves a chunk, scale and zero, to a vector of scales and one of zeros for each unit.
template <int UNITS> inline void half_pairs(const uint8_t* p, int part, Floats* scale, Floats* zero) {
    if constexpr (UNITS < 4) {
        const Ints a = load_ints(p), b = UNITS == 1 ? a : load_ints(p + 64);
        for (int u = 0; u < UNITS; u++) {
            const __m256i low = _mm512_cvtepi32_epi16(lane_chunks(2 * UNITS, 2 * u));   // a constant
            const Ints at = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_add_epi16(low, _mm256_set1_epi16(1)), 1);
            widen(UNITS == 1 ? _mm512_permutexvar_epi16(at, a) : _mm512_permutex2var_epi16(a, at, b), scale[u], zero[u]);
        }
    } else {
        Ints pairs[4];
        take<4>(p, part, pairs);
        for (int u = 0; u < 4; u++) {
            scale[u] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs[u]));
            zero[u] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs[u], 16)));
        }
    }
}

// For CODEBOOK: a scale for each half of the lanes, and numbers by the codes' low four bits.
inline Floats half_scales(const uint8_t* p, int) {
    int pair;
    memcpy(&pair, p, 4);
    const __m256i places = _mm256_setr_epi32(0, 0, 0, 0, 0x00010001, 0x00010001, 0x00010001, 0x00010001);
    return _mm512_cvtph_ps(_mm256_permutexvar_epi16(places, _mm256_set1_epi32(pair)));
}
struct Table {
    Floats numbers;
    explicit Table(const float* p) : numbers(load(p)) {}
};
inline Floats looked_up(const Table& table, Ints codes) { return _mm512_permutexvar_ps(codes, table.numbers); }

// Products of four codes with four numbers in each lane, summed exactly, for each of the numbers' planes.
#if defined(__AVX512VNNI__)
template <int BITS, int PLANES> struct Dots {
    Ints planes[PLANES];
    INLINED void clear() {
        for (int i = 0; i < PLANES; i++) planes[i] = _mm512_setzero_si512();
    }
    INLINED void add(Ints codes, const uint8_t* numbers) {
        for (int i = 0; i < PLANES; i++) planes[i] = _mm512_dpbusd_epi32(planes[i], codes, load_ints(numbers + 64 * i));
    }
    INLINED Ints sum() const {
        if constexpr (PLANES == 1) return planes[0];
        else return _mm512_add_epi32(_mm512_slli_epi32(planes[0], 8), planes[1]);
    }
};
#else
// In 16 bits: pairs of products with codes of up to 4 bits stay below 3,840, and a chunk has at most 8 of them for each
// lane (of 3 bits 16 below 1,792). Codes of 8 bits are taken by halves.
template <int BITS, int PLANES> struct Dots {
    static constexpr int HALVES = BITS == 8 ? 2 : 1;
    Ints sums[HALVES][PLANES];
    INLINED void clear() {
        for (int h = 0; h < HALVES; h++)
            for (int i = 0; i < PLANES; i++) sums[h][i] = _mm512_setzero_si512();
    }
    INLINED void add(Ints codes, const uint8_t* numbers) {
        const Ints low = BITS == 8 ? bits_of<0, 0x0F0F0F0F>(codes) : codes, high = bits_of<4, 0x0F0F0F0F>(codes);
        for (int i = 0; i < PLANES; i++) {
            const Ints x = load_ints(numbers + 64 * i);
            for (int h = 0; h < HALVES; h++) sums[h][i] = _mm512_add_epi16(sums[h][i], _mm512_maddubs_epi16(h ? high : low, x));
        }
    }
    INLINED Ints sum() const {
        Ints out = _mm512_setzero_si512();
        for (int h = 0; h < HALVES; h++)
            for (int i = 0; i < PLANES; i++) {
                const int weight = (h ? 16 : 1) * (i + 1 < PLANES ? 256 : 1);
                out = _mm512_add_epi32(out, _mm512_madd_epi16(sums[h][i], _mm512_set1_epi16((short)weight)));
            }
        return out;
    }
};
#endif

// The sum of 32 chunks in the order of a warp's: chunks 16 apart, then 8, 4, 2 and 1.
inline float total(const Floats (&even)[PARTS], const Floats (&odd)[PARTS]) {
    Floats v = _mm512_add_ps(even[0], odd[0]);
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4E));
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xB1));
    v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4E));
    v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1));
    return _mm512_cvtss_f32(v);
}

}   // namespace
}   // namespace moeflow
