// The few instructions that CUDA C++ has no plain word for, in PTX: sm_75 and later, no header, so that NVRTC needs no
// include directory. Tests put software of the same names in their place (MOEFLOW_EMULATOR).
#pragma once

#ifdef MOEFLOW_EMULATOR
#include "primitives.hpp"
#else

// c + four products of bytes, exactly (modulo 2^32); `a` unsigned or signed, `b` signed.
__device__ __forceinline__ int dp4a_us(unsigned a, int b, int c) {
    int d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ int dp4a_ss(int a, int b, int c) {
    int d;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ float half_to_float(unsigned short h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ unsigned short float_to_half(float f) {   // to nearest, ties to even
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// Two halves in a word, the first in the low bits. Each operation rounds once.
__device__ __forceinline__ unsigned h2_fma(unsigned a, unsigned b, unsigned c) {
    unsigned d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ unsigned h2_add(unsigned a, unsigned b) {
    unsigned d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ unsigned h2_mul(unsigned a, unsigned b) {
    unsigned d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ float2 h2_to_float2(unsigned v) {
    float2 f;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(f.x), "=f"(f.y) : "r"(v));
    return f;
}
__device__ __forceinline__ unsigned float2_to_h2(float low, float high) {
    unsigned v;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#else
    asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
        : "=r"(v) : "f"(low), "f"(high));
#endif
    return v;
}

#if __CUDA_ARCH__ >= 800
// Two bfloat16 in a word, the first in the low bits, each to nearest, ties to even.
__device__ __forceinline__ unsigned float2_to_b2(float low, float high) {
    unsigned v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
#endif

// Weights, read once: they take no room in L1, and are the first to leave L2, where a layer's weights would otherwise push
// out what every step needs again: the small kernels' code, keys and values, routers. Nobody may write them meanwhile.
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
    uint4 v;
#if __CUDA_ARCH__ >= 800
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p), "l"(policy));
#else
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
#endif
    return v;
}

// Brings a line to L2.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// From Hopper on a kernel may begin while the one before it in the stream ends (programmatic dependent launch). What it does
// ahead of `wait_for_previous` must not need, or overwrite, anything that earlier kernels give or read; every kernel calls
// it first thing in every thread, so that the end of one is the end of all before it. What comes behind it must not be read
// by __ldg, which the compiler may move ahead. `let_next_begin` allows the next one
// to begin, which then waits in turn.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Page-locked host memory, never from a cache. volatile keeps a run of loads together, so that all are in flight.
__device__ __forceinline__ uint4 load_host(const uint4* p) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Flags that another kernel, or the host, reads or writes meanwhile.
__device__ __forceinline__ int load_volatile(const int* p) { return *(const volatile int*)p; }
__device__ __forceinline__ void store_volatile(int* p, int value) { *(volatile int*)p = value; }

// A clock that runs on while nothing does, in steps of up to a microsecond.
__device__ __forceinline__ long long nanoseconds() {
    long long t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

#endif

// A sum and a product that the compiler may not fuse into one rounding.
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }

// bfloat16 is the upper half of a float: the same on every device, as sm_75 has no instruction for it.
__device__ __forceinline__ float bf16_to_float(unsigned short b) { return __uint_as_float((unsigned)b << 16); }
__device__ __forceinline__ unsigned short float_to_bf16(float f) {   // to nearest, ties to even; NaN stays NaN
#if __CUDA_ARCH__ >= 800 && !defined(MOEFLOW_EMULATOR)
    unsigned short b;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(f));
    return b;
#else
    const unsigned u = __float_as_uint(f);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) return (unsigned short)(u >> 16 | 0x40u);
    return (unsigned short)((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
#endif
}
#if defined(MOEFLOW_EMULATOR) || __CUDA_ARCH__ < 800
__device__ __forceinline__ unsigned float2_to_b2(float low, float high) {
    return float_to_bf16(low) | (unsigned)float_to_bf16(high) << 16;
}
#endif
