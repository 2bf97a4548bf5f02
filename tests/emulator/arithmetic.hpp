// Bits, conversions and functions of numbers under CUDA's names. Part of cuda.hpp.
//
// Declared here one by one, as NVRTC has them without any header: <math.h> costs more to read than a kernel to compile.
#pragma once

extern "C" {
float expf(float); float exp2f(float); float logf(float); float log2f(float); float powf(float, float);
float tanhf(float); float erff(float); float sinf(float); float cosf(float); float sqrtf(float); float fabsf(float);
float fmaxf(float, float); float fminf(float, float); float fmaf(float, float, float); float fmodf(float, float);
float ldexpf(float, int); float frexpf(float, int*); float rintf(float); float roundf(float); float floorf(float);
float ceilf(float); float truncf(float); float copysignf(float, float); float nearbyintf(float);
double fabs(double); double fma(double, double, double); double sqrt(double);
int abs(int); long long llabs(long long);
}
inline float abs(float v) { return fabsf(v); }
inline float rsqrtf(float v) { return 1.f / sqrtf(v); }
inline float __expf(float v) { return expf(v); }
inline float __logf(float v) { return logf(v); }
inline float __exp2f(float v) { return exp2f(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.f / v; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline bool isnan(float v) { return __builtin_isnan(v); }
inline bool isinf(float v) { return __builtin_isinf(v); }
inline bool isfinite(float v) { return __builtin_isfinite(v); }

template <class A, class B> auto min(A a, B b) -> decltype(a + b) { return b < a ? b : a; }
template <class A, class B> auto max(A a, B b) -> decltype(a + b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline unsigned __brev(unsigned v) {
    unsigned out = 0;
    for (int i = 0; i < 32; i++) out |= (v >> i & 1u) << (31 - i);
    return out;
}
// Byte i of the result is the byte of the eight in (b, a) that nibble i of `selector` names; bit 3 repeats its sign.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned nibble = selector >> (4 * i) & 15u;
        unsigned byte = (unsigned)(both >> (8 * (nibble & 7u))) & 255u;
        if (nibble & 8u) byte = byte & 128u ? 255u : 0u;
        out |= byte << (8 * i);
    }
    return out;
}

inline int __float_as_int(float v) { return emulator::from_bits<int>(emulator::bits_of(v)); }
inline unsigned __float_as_uint(float v) { return emulator::from_bits<unsigned>(emulator::bits_of(v)); }
inline float __int_as_float(int v) { return emulator::from_bits<float>(emulator::bits_of(v)); }
inline float __uint_as_float(unsigned v) { return emulator::from_bits<float>(emulator::bits_of(v)); }

// The device saturates, and makes 0 of what is no number; the CPU does neither.
inline int __float2int_rz(float v) {
    if (v != v) return 0;
    return v >= 2147483648.f ? 0x7FFFFFFF : v < -2147483648.f ? -0x7FFFFFFF - 1 : (int)v;
}
inline int __float2int_rn(float v) { return __float2int_rz(rintf(v)); }
inline int __float2int_rd(float v) { return __float2int_rz(floorf(v)); }
inline int __float2int_ru(float v) { return __float2int_rz(ceilf(v)); }
inline unsigned __float2uint_rz(float v) {
    if (v != v || v < 0.f) return 0u;
    return v >= 4294967296.f ? 0xFFFFFFFFu : (unsigned)v;
}
inline unsigned __float2uint_rn(float v) { return __float2uint_rz(rintf(v)); }
inline float __int2float_rn(int v) { return (float)v; }
inline float __uint2float_rn(unsigned v) { return (float)v; }
inline float __saturatef(float v) { return v > 0.f ? fminf(v, 1.f) : 0.f; }
