// A packed matrix back to plain numbers, for products with many tokens: w[row, column] in OUTPUT, rounded once.
//
// Eight columns a thread, so that 16-bit results leave as one store of 16 bytes. The arithmetic is that of
// moeflow.kernels.dequantize, in float32 and without contraction, bit for bit.
#include "format.cuh"

#ifndef OUTPUT
#define OUTPUT FLOAT
#endif

__device__ __forceinline__ int code_at(const int* words, const int* high, long long row, int column, int columns) {
#if KIND == DENSE
    return 0;
#else
    const int word = words[row * (columns / COLUMNS_PER_WORD) + column / COLUMNS_PER_WORD];
    const int code = (word >> (column % COLUMNS_PER_WORD * CODE_BITS)) & ((1 << CODE_BITS) - 1);
#if KIND == SIGNED
    return (signed char)code;
#elif KIND == AFFINE && BITS == 3
    const int rest = column % 32;
    const int bit = rest % 16 / 4 * 8 + rest / 16 * 4 + rest % 4;   // as kernels.packing lays out the third bit
    return code | ((high[row * (columns / 32) + column / 32] >> bit) & 1) << 2;
#else
    return code;
#endif
#endif
}

extern "C" __global__ void __launch_bounds__(256)
unpack(const char* matrix, long long words, long long high, long long scales_, long long steps_, const float* codebook,
       void* out, long long rows, long long columns_) {
    const int columns = (int)columns_, row = blockIdx.x;
    const int column0 = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (column0 >= columns) return;
    const char* scales = matrix + scales_;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int column = column0 + i;
        const int code = code_at((const int*)(matrix + words), (const int*)(matrix + high), row, column, columns);
#if KIND == AFFINE
        const int groups = columns / GROUP;
        const long long g = (long long)row * groups + column / GROUP;
#if META == 8
        const unsigned char* meta = (const unsigned char*)scales + 2 * g;
        const float* steps = (const float*)(matrix + steps_) + 4 * ((long long)row * ((groups + 127) / 128) + column / GROUP / 128);
        const float scale = add_rn(mul_rn((float)meta[0], steps[0]), steps[1]);
        const float zero = add_rn(mul_rn((float)meta[1], steps[2]), steps[3]);
#else
        const unsigned short* pair = (const unsigned short*)scales + 2 * g;
        const float scale = half_to_float(pair[0]), zero = half_to_float(pair[1]);
#endif
        v[i] = mul_rn(add_rn((float)code, -zero), scale);
#elif KIND == SIGNED
        v[i] = mul_rn((float)code, ((const float*)scales)[row]);
#elif KIND == CODEBOOK
        v[i] = mul_rn(codebook[code], half_to_float(((const unsigned short*)scales)[(long long)row * (columns / GROUP) + column / GROUP]));
#endif
    }
#if OUTPUT == FLOAT
    float4* target = (float4*)((float*)out + (long long)row * columns + column0);
    target[0] = make_float4(v[0], v[1], v[2], v[3]);
    target[1] = make_float4(v[4], v[5], v[6], v[7]);
#else
    unsigned two[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
#if OUTPUT == HALF
        two[i] = float_to_half(v[2 * i]) | (unsigned)float_to_half(v[2 * i + 1]) << 16;
#else
        two[i] = float_to_bf16(v[2 * i]) | (unsigned)float_to_bf16(v[2 * i + 1]) << 16;
#endif
    *(uint4*)((unsigned short*)out + (long long)row * columns + column0) = make_uint4(two[0], two[1], two[2], two[3]);
#endif
}
