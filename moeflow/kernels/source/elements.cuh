// Numbers of the model's own type, read and written eight at a time: what the kernels of the dense part share.
//
//   ELEMENT  FLOAT, HALF or BFLOAT
#pragma once
#include "primitives.cuh"

#define FLOAT 0
#define HALF 1
#define BFLOAT 2

constexpr int EIGHT = ELEMENT == FLOAT ? 2 : 1;   // 16-byte words of eight numbers
constexpr int SIZE = ELEMENT == FLOAT ? 4 : 2;    // bytes of one

// Eight numbers as they lie in memory.
struct Raw { uint4 word[EIGHT]; };

__device__ __forceinline__ const void* place(const void* base, long long index) { return (const char*)base + index * SIZE; }
__device__ __forceinline__ void* place(void* base, long long index) { return (char*)base + index * SIZE; }

__device__ __forceinline__ Raw load_eight(const void* base, long long index) {
    const uint4* from = (const uint4*)place(base, index);
    Raw raw;
#pragma unroll
    for (int i = 0; i < EIGHT; i++) raw.word[i] = from[i];
    return raw;
}
__device__ __forceinline__ void store_eight(void* base, long long index, const Raw& raw) {
    uint4* to = (uint4*)place(base, index);
#pragma unroll
    for (int i = 0; i < EIGHT; i++) to[i] = raw.word[i];
}
__device__ __forceinline__ Raw no_numbers() {
    Raw raw;
#pragma unroll
    for (int i = 0; i < EIGHT; i++) raw.word[i] = make_uint4(0u, 0u, 0u, 0u);
    return raw;
}

__device__ __forceinline__ float from_bits16(unsigned short bits) {
#if ELEMENT == HALF
    return half_to_float(bits);
#else
    return bf16_to_float(bits);
#endif
}
__device__ __forceinline__ unsigned short to_bits16(float value) {
#if ELEMENT == HALF
    return float_to_half(value);
#else
    return float_to_bf16(value);
#endif
}

__device__ __forceinline__ float load_one(const void* base, long long index) {
#if ELEMENT == FLOAT
    return ((const float*)base)[index];
#else
    return from_bits16(((const unsigned short*)base)[index]);
#endif
}
__device__ __forceinline__ void store_one(void* base, long long index, float value) {
#if ELEMENT == FLOAT
    ((float*)base)[index] = value;
#else
    ((unsigned short*)base)[index] = to_bits16(value);
#endif
}
// What a number becomes where transformers keeps it in the model's type.
__device__ __forceinline__ float rounded(float value) {
#if ELEMENT == FLOAT
    return value;
#else
    return from_bits16(to_bits16(value));
#endif
}

__device__ __forceinline__ void unpack_eight(const Raw& raw, float* out) {
#pragma unroll
    for (int i = 0; i < EIGHT; i++) {
        const unsigned words[4] = {raw.word[i].x, raw.word[i].y, raw.word[i].z, raw.word[i].w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
#if ELEMENT == FLOAT
            out[4 * i + j] = __uint_as_float(words[j]);
#else
            out[2 * j] = from_bits16((unsigned short)words[j]);
            out[2 * j + 1] = from_bits16((unsigned short)(words[j] >> 16));
#endif
        }
    }
}
__device__ __forceinline__ Raw pack_eight(const float* in) {
    unsigned words[4 * EIGHT];
#pragma unroll
    for (int i = 0; i < 4 * EIGHT; i++) {
#if ELEMENT == FLOAT
        words[i] = __float_as_uint(in[i]);
#else
        words[i] = to_bits16(in[2 * i]) | (unsigned)to_bits16(in[2 * i + 1]) << 16;
#endif
    }
    Raw raw;
#pragma unroll
    for (int i = 0; i < EIGHT; i++) raw.word[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    return raw;
}
