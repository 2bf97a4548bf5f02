// 16 lanes as plain arrays: for machines without AVX2, and the meaning of what the other levels do.
#pragma once
#include <initializer_list>

#include "numbers.hpp"
#include "shape.hpp"

// The compiler shall decide: unrolled, these loops take minutes to compile.
#define INLINED
#define UNROLLED

namespace moeflow {
namespace {

constexpr int WIDTH = 16, PARTS = 1;
constexpr int ROWS = 1;   // that are computed together
constexpr int MOST = 1;   // vectors that meet a block at once

struct Ints { uint32_t at[WIDTH]; };
struct Floats { float at[WIDTH]; };

constexpr int chunk_of(int lane) { return 4 * (lane % 4) + lane / 4; }

// f of every lane.
template <class V, class F> inline V lanes(F f) {
    V out;
    for (int i = 0; i < WIDTH; i++) out.at[i] = f(i);
    return out;
}
inline Floats all(float v) {
    return lanes<Floats>([=](int) { return v; });
}
inline Floats load(const float* p) {
    return lanes<Floats>([=](int i) { return p[i]; });
}
inline Floats to_floats(const Ints& v) {
    return lanes<Floats>([&](int i) { return (float)(int32_t)v.at[i]; });
}
inline Floats fused(const Floats& a, const Floats& b, const Floats& c) {
    return lanes<Floats>([&](int i) { return __builtin_fmaf(a.at[i], b.at[i], c.at[i]); });
}
inline Floats fused_less(const Floats& a, const Floats& b, const Floats& c) {   // c - a * b
    return lanes<Floats>([&](int i) { return __builtin_fmaf(-a.at[i], b.at[i], c.at[i]); });
}
inline Ints flip_signs(const Ints& v) {
    return lanes<Ints>([&](int i) { return v.at[i] ^ 0x80808080u; });
}
inline Ints less_128_times(const Ints& dot, const Floats& sum) {
    return lanes<Ints>([&](int i) { return dot.at[i] - ((uint32_t)(int32_t)sum.at[i] << 7); });
}
template <int SHIFT, int MASK> inline Ints bits_of(const Ints& v) {
    return lanes<Ints>([&](int i) { return v.at[i] >> SHIFT & (uint32_t)MASK; });
}
// Two bits from LOW on of each byte, and above them one bit of `high`, from HIGH on.
template <int LOW, int HIGH> inline Ints joined(const Ints& low, const Ints& high) {
    return lanes<Ints>([&](int i) { return (low.at[i] >> LOW & 0x03030303u) | (high.at[i] >> HIGH & 0x01010101u) << 2; });
}

template <class T> inline T number_at(const uint8_t* p, int64_t index) {
    T v;
    memcpy(&v, p + index * (int64_t)sizeof(T), sizeof(T));
    return v;
}
inline Floats load_halves(const uint8_t* p) {
    return lanes<Floats>([=](int i) { return half_to_float(number_at<uint16_t>(p, i)); });
}
inline Floats load_bfloats(const uint8_t* p) {
    return lanes<Floats>([=](int i) { return bfloat_to_float(number_at<uint16_t>(p, i)); });
}
// Which lanes count: those of the first `count` chunks. A codebook's have four words a chunk.
struct There {
    int kind, count;
    There(int kind, int count) : kind(kind), count(count) {}
};
inline Floats fused_there(const There& there, int, const Floats& a, const Floats& b, const Floats& c) {
    return lanes<Floats>([&](int i) {
        const int chunk = there.kind == CODEBOOK ? i / 4 : chunk_of(i);
        return chunk < there.count ? __builtin_fmaf(a.at[i], b.at[i], c.at[i]) : c.at[i];
    });
}
// N integers a chunk, in the order of chunks, to the order of lanes.
template <int N> inline void take(const uint8_t* p, int, Ints* out) {
    for (int n = 0; n < N; n++) out[n] = lanes<Ints>([=](int i) { return number_at<uint32_t>(p, chunk_of(i) * N + n); });
}
// 16 bits a chunk.
inline Ints take_shorts(const uint8_t* p, int) {
    return lanes<Ints>([=](int i) { return (uint32_t)number_at<uint16_t>(p, chunk_of(i)); });
}
// Where lanes find what `ratio` chunks share.
struct Spread {
    int ratio;
    explicit Spread(int ratio) : ratio(ratio) {}
};
inline Ints spread_shorts(const Spread& spread, const uint8_t* p, int, int) {
    return lanes<Ints>([&](int i) { return (uint32_t)number_at<uint16_t>(p, chunk_of(i) / spread.ratio); });
}
inline void widen(const Ints& pairs, Floats& scale, Floats& zero) {
    scale = lanes<Floats>([&](int i) { return half_to_float((uint16_t)pairs.at[i]); });
    zero = lanes<Floats>([&](int i) { return half_to_float((uint16_t)(pairs.at[i] >> 16)); });
}
inline void spread_half_pairs(const Spread& spread, const uint8_t* p, int, int, Floats& scale, Floats& zero) {
    const Ints pairs = lanes<Ints>([&](int i) { return number_at<uint32_t>(p, chunk_of(i) / spread.ratio); });
    widen(pairs, scale, zero);
}
// UNITS pairs of halves a chunk, scale and zero, to a vector of scales and one of zeros for each unit.
template <int UNITS> inline void half_pairs(const uint8_t* p, int part, Floats* scale, Floats* zero) {
    Ints pairs[UNITS];
    take<UNITS>(p, part, pairs);
    for (int u = 0; u < UNITS; u++) widen(pairs[u], scale[u], zero[u]);
}

// For CODEBOOK: a scale for each half of the lanes, and numbers by the codes' low four bits.
inline Ints load_ints(const uint8_t* p) {
    return lanes<Ints>([=](int i) { return number_at<uint32_t>(p, i); });
}
inline Floats half_scales(const uint8_t* p, int) {
    return lanes<Floats>([=](int i) { return half_to_float(number_at<uint16_t>(p, i / 8)); });
}
struct Table {
    const float* numbers;
    explicit Table(const float* p) : numbers(p) {}
};
inline Floats looked_up(const Table& table, const Ints& codes) {
    return lanes<Floats>([&](int i) { return table.numbers[codes.at[i] & 15u]; });
}

// Products of four codes with four numbers in each lane, summed exactly.
template <int BITS, int PLANES> struct Dots {
    Ints dot;
    inline void clear() {
        dot = lanes<Ints>([](int) { return 0u; });
    }
    inline void add(const Ints& codes, const uint8_t* numbers) {
        for (int i = 0; i < WIDTH; i++) {
            int32_t sum = 0;
            for (int b = 0; b < 4; b++) {
                const uint8_t* at = numbers + 4 * i + b;
                const int32_t high = (int8_t)at[0], low = PLANES == 2 ? (int8_t)at[64] : 0;
                sum += (int32_t)(codes.at[i] >> (8 * b) & 255u) * (PLANES == 2 ? high * 256 + low : high);
            }
            dot.at[i] += (uint32_t)sum;
        }
    }
    inline Ints sum() const { return dot; }
};

// The sum of 32 chunks in the order of a warp's: chunks 16 apart, then 8, 4, 2 and 1, which are lanes 2, 1, 8 and 4.
inline float total(const Floats (&even)[PARTS], const Floats (&odd)[PARTS]) {
    Floats v = lanes<Floats>([&](int i) { return even[0].at[i] + odd[0].at[i]; });
    for (const int apart : {2, 1, 8, 4}) v = lanes<Floats>([&](int i) { return v.at[i] + v.at[i ^ apart]; });
    return v.at[0];
}

}   // namespace
}   // namespace moeflow
