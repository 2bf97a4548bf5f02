// A packed matrix back to plain numbers, for products with many tokens: w[row, column] in OUTPUT, rounded once.
//
// Codes, scales and results lie row after row without gaps, so a matrix is one list of pieces of eight columns, and no
// row has to be told from the next where scales go by groups. A piece is one load of codes, one of a scale and one store
// of 16 bytes (16-bit results); a warp's pieces are neighbours, so each of these is one contiguous range. A thread has
// TURNS pieces and asks for all their bytes before it needs any. The arithmetic is that of moeflow.kernels.dequantize,
// in float32 and without contraction, bit for bit.
#include "format.cuh"

#ifndef OUTPUT
#define OUTPUT FLOAT
#endif

constexpr int THREADS = 256, TURNS = 4;

struct Piece { unsigned codes[2]; unsigned third; float scale, zero; };

#if KIND != DENSE
// A code as a float without a conversion, which is slow: `bits`, the code in its place, becomes the mantissa of 2^23 +
// code * 2^shift, and taking 2^23 away and dividing by 2^shift are exact. At most 16 bits.
__device__ __forceinline__ float number(unsigned bits, int shift) {
    const float unit = 1.f / (float)(1 << shift);
    return __fmaf_rn(__uint_as_float(0x4B000000u | bits), unit, -8388608.f * unit);
}

__device__ __forceinline__ float code(const Piece& piece, int i) {
    constexpr unsigned mask = (1u << CODE_BITS) - 1u;
    const int at = i * CODE_BITS, shift = at % 16;
    const unsigned half = piece.codes[at / 32] >> (at / 16 % 2 * 16);
#if KIND == AFFINE && BITS == 3
    const int bit = i / 4 * 8 + i % 4;   // as kernels.packing lays out the third bit, from the piece's first on
    return add_rn(number(half & (mask << shift), shift), mul_rn(4.f, number(piece.third & (1u << bit), bit)));
#elif KIND == SIGNED
    return add_rn(number(half & (mask << shift), shift), -128.f);
#else
    return number(half & (mask << shift), shift);
#endif
}

// All that the piece `p` takes from memory.
__device__ __forceinline__ Piece load(const char* words, const char* high, const char* scales, const char* steps_,
                                      unsigned p, unsigned pieces_per_row) {
    Piece piece;
#if CODE_BITS == 2
    piece.codes[0] = ((const unsigned short*)words)[p];
#elif CODE_BITS == 4
    piece.codes[0] = ((const unsigned*)words)[p];
#else
    const uint2 both = ((const uint2*)words)[p];
    piece.codes[0] = both.x;
    piece.codes[1] = both.y;
#endif
#if KIND == AFFINE && BITS == 3
    piece.third = (unsigned)((const unsigned short*)high)[p / 4 * 2 + p % 2] >> (p % 4 / 2 * 4);
#endif
#if KIND == AFFINE
    const unsigned group = p / (GROUP / 8);
#if META == 8
    const unsigned groups = pieces_per_row / (GROUP / 8), row = group / groups;
    const unsigned pair = ((const unsigned short*)scales)[group];
    const float4 steps = ((const float4*)steps_)[row * ((groups + 127) / 128) + (group - row * groups) / 128];
    piece.scale = add_rn(mul_rn((float)(pair & 0xFFu), steps.x), steps.y);
    piece.zero = add_rn(mul_rn((float)(pair >> 8), steps.z), steps.w);
#else
    const unsigned pair = ((const unsigned*)scales)[group];
    piece.scale = half_to_float((unsigned short)pair);
    piece.zero = half_to_float((unsigned short)(pair >> 16));
#endif
#elif KIND == SIGNED
    piece.codes[0] ^= 0x80808080u;   // code + 128, which has no sign
    piece.codes[1] ^= 0x80808080u;
    piece.scale = ((const float*)scales)[p / pieces_per_row];
#else
    piece.scale = half_to_float(((const unsigned short*)scales)[p / (GROUP / 8)]);
#endif
    return piece;
}

__device__ __forceinline__ void store(void* out, unsigned p, const float* v) {
#if OUTPUT == FLOAT
    float4* target = (float4*)out + 2ull * p;
    target[0] = make_float4(v[0], v[1], v[2], v[3]);
    target[1] = make_float4(v[4], v[5], v[6], v[7]);
#elif OUTPUT == HALF
    ((uint4*)out)[p] = make_uint4(float2_to_h2(v[0], v[1]), float2_to_h2(v[2], v[3]), float2_to_h2(v[4], v[5]), float2_to_h2(v[6], v[7]));
#else
    ((uint4*)out)[p] = make_uint4(float2_to_b2(v[0], v[1]), float2_to_b2(v[2], v[3]), float2_to_b2(v[4], v[5]), float2_to_b2(v[6], v[7]));
#endif
}

// Blocks of THREADS, one for every THREADS * TURNS pieces.
extern "C" __global__ void __launch_bounds__(THREADS)
unpack(const char* matrix, long long words, long long high, long long scales, long long steps, const float* codebook,
       void* out, long long rows, long long columns) {
    const unsigned pieces_per_row = (unsigned)(columns / 8), pieces = (unsigned)rows * pieces_per_row;
    const unsigned first = blockIdx.x * (THREADS * TURNS) + threadIdx.x;
#if KIND == CODEBOOK
    __shared__ float numbers[16];
    if (threadIdx.x < 16) numbers[threadIdx.x] = codebook[threadIdx.x];
    __syncthreads();
#endif
    Piece mine[TURNS];
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        const unsigned p = first + t * THREADS;   // behind the end the last is read again, and not stored
        mine[t] = load(matrix + words, matrix + high, matrix + scales, matrix + steps, p < pieces ? p : pieces - 1, pieces_per_row);
    }
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        const unsigned p = first + t * THREADS;
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
#if KIND == AFFINE
            v[i] = mul_rn(add_rn(code(mine[t], i), -mine[t].zero), mine[t].scale);
#elif KIND == SIGNED
            v[i] = mul_rn(code(mine[t], i), mine[t].scale);
#else
            v[i] = mul_rn(numbers[mine[t].codes[0] >> (4 * i) & 15u], mine[t].scale);
#endif
        }
        if (p < pieces) store(out, p, v);
    }
}
#endif
