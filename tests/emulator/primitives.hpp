// The emulator's version of what primitives.cuh says in PTX: the same names, rounded the same.
#pragma once
#include <time.h>

inline int dp4a_us(unsigned a, int b, int c) {
    unsigned sum = (unsigned)c;   // wraps, as on the device
    for (int i = 0; i < 32; i += 8) sum += (unsigned)((unsigned char)(a >> i) * (signed char)(b >> i));
    return (int)sum;
}
inline int dp4a_ss(int a, int b, int c) {
    unsigned sum = (unsigned)c;
    for (int i = 0; i < 32; i += 8) sum += (unsigned)((signed char)(a >> i) * (signed char)(b >> i));
    return (int)sum;
}

inline float half_to_float(unsigned short h) {
    const unsigned sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 0x3FFu;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | mantissa << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112u) << 23 | mantissa << 13);
    return __uint_as_float(sign | __float_as_uint((float)mantissa * 0x1p-24f));
}

inline unsigned short float_to_half(float v) {
    unsigned u = __float_as_uint(v);
    const unsigned sign = u >> 16 & 0x8000u;
    u &= 0x7FFFFFFFu;
    if (u > 0x7F800000u) return 0x7FFF;
    if (u >= 0x477FF000u) return (unsigned short)(sign | 0x7C00u);   // from 65520 on the nearest is infinity
    // Below 2^-14: next to one half a float's last place is the smallest half, so that the addition rounds.
    if (u < 0x38800000u) return (unsigned short)(sign | (__float_as_uint(__uint_as_float(u) + 0.5f) - 0x3F000000u));
    return (unsigned short)(sign | (u + 0xC8000FFFu + (u >> 13 & 1u)) >> 13);
}

namespace emulator {

// a + b, rounded to odd: an inexact sum has its last bit set, so that a second rounding cannot go wrong.
inline double add_to_odd(double a, double b) {
    const double sum = a + b;
    if (!__builtin_isfinite(sum)) return sum;
    const double back = sum - a, error = (a - (sum - back)) + (b - back);
    if (error == 0) return sum;
    const bool beyond = (error < 0) != (sum < 0);
    return from_bits<double>((bits_of(sum) - beyond) | 1u);
}

inline unsigned short double_to_half(double v) {
    if (v == 0 || !__builtin_isfinite(v)) return float_to_half((float)v);
    Word u = bits_of(v);
    const bool inexact = (u & 0x1FFFFFFFu) != 0;   // what a float has no place for
    u &= ~0x1FFFFFFFull;
    if (inexact) u |= 0x20000000u;
    return float_to_half((float)from_bits<double>(u));
}

template <class F> unsigned each_half(F function) {
    return double_to_half(function(0)) | (unsigned)double_to_half(function(16)) << 16;
}
inline double half_at(unsigned v, int shift) { return half_to_float((unsigned short)(v >> shift)); }

}  // namespace emulator

inline unsigned h2_fma(unsigned a, unsigned b, unsigned c) {
    using emulator::half_at;
    return emulator::each_half([=](int s) {
        return emulator::add_to_odd(half_at(a, s) * half_at(b, s), half_at(c, s));
    });
}
inline unsigned h2_add(unsigned a, unsigned b) {
    return emulator::each_half([=](int s) { return emulator::half_at(a, s) + emulator::half_at(b, s); });
}
inline unsigned h2_mul(unsigned a, unsigned b) {
    return emulator::each_half([=](int s) { return emulator::half_at(a, s) * emulator::half_at(b, s); });
}
inline float2 h2_to_float2(unsigned v) {
    return {half_to_float((unsigned short)v), half_to_float((unsigned short)(v >> 16))};
}
inline unsigned float2_to_h2(float low, float high) { return float_to_half(low) | (unsigned)float_to_half(high) << 16; }

inline void wait_for_previous() {}
inline void let_next_begin() {}
inline void prefetch(const void*) {}

inline uint4 load_stream(const uint4* p) { return *p; }
inline uint4 load_host(const uint4* p) { return *p; }
inline int load_volatile(const int* p) {
    emulator::spin();
    return *(const volatile int*)p;
}
inline long long nanoseconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}
inline void store_volatile(int* p, int value) {
    emulator::preempt();
    *(volatile int*)p = value;
}
