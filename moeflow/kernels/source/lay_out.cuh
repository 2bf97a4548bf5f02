// Activations as `gemv` takes them: pieces, a scale per chunk, and the sum of each unit where codes have a zero point.
#pragma once
#include "format.cuh"

// N neighbouring columns a thread, from `column` on; the threads of a chunk lie in one warp, and all of a warp come here.
// target, scales, sums: of the row. `inside`: whether the columns exist.
template <int N>
__device__ __forceinline__ void lay_out(const float (&v)[N], int column, bool inside, uint4* target, float* scales,
                                        float* sums) {
#if KIND == DENSE
#pragma unroll
    for (int q = 0; q < N; q += 4)
        if (inside)
            target[piece((column + q) / CHUNK, (column + q) % CHUNK / 4)] = make_uint4(
                __float_as_uint(v[q]), __float_as_uint(v[q + 1]), __float_as_uint(v[q + 2]), __float_as_uint(v[q + 3]));
#else
    const int c = column / CHUNK, at = column % CHUNK;
    float largest = 0.f, bad = 0.f;   // NaN where a number is none
#pragma unroll
    for (int i = 0; i < N; i++) {
        largest = fmaxf(largest, fabsf(v[i]));
        bad += 0.f * v[i];
    }
#pragma unroll
    for (int o = CHUNK / N / 2; o; o >>= 1) {
        largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, o));
        bad += __shfl_xor_sync(0xFFFFFFFFu, bad, o);
    }
#if KIND == CODEBOOK
    const float scale = largest > TINY ? largest : 1.f;
    if (inside) {
        unsigned* halves = (unsigned*)&target[piece(c, at / 8)] + at % 8 / 2;
#pragma unroll
        for (int i = 0; i < N; i += 2) halves[i / 2] = float2_to_h2(v[i] / scale, v[i + 1] / scale);
        if (at == 0) scales[c] = scale + bad;
    }
#else
    const float scale = largest > TINY ? largest / FULL_SCALE : 1.f;
    int total = 0;
    if (inside) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int number = __float2int_rn(v[i] / scale);
            const int high = (number + 128) >> 8, low = number - high * 256;
            total += number;
            // Byte `b` of group `f` of word `w` is the column that byte `b` of the word holds in field `f`.
            const int w = (at + i) / COLUMNS_PER_WORD, rest = (at + i) % COLUMNS_PER_WORD;
            const int b = rest / FIELDS, f = rest % FIELDS;
            const int group = w * 2 * FIELDS + f;             // of the chunk's integers; low bytes FIELDS further
            signed char* bytes = (signed char*)&target[piece(c, group / 4)];
            signed char* low_bytes = (signed char*)&target[piece(c, (group + FIELDS) / 4)];
            bytes[group % 4 * 4 + b] = (signed char)high;
            low_bytes[(group + FIELDS) % 4 * 4 + b] = (signed char)low;
        }
        if (at == 0) scales[c] = scale + bad;
    }
#if KIND == AFFINE
#pragma unroll
    for (int o = UNIT / N / 2; o; o >>= 1) total += __shfl_xor_sync(0xFFFFFFFFu, total, o);
    if (inside && at % UNIT == 0) sums[c * UNITS + at / UNIT] = (float)total;
#endif
#endif
#endif
}
