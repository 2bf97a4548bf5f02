// Packed matrices times vectors: out[choice] = W[buffer of choice] @ x, for every choice of the router at once.
//
// A warp takes ROWS rows; its lanes walk along the columns, 16 bytes of codes a lane and step, so that every load
// is one contiguous run. The next step's codes are on their way while this step's are multiplied. Sums run in a
// fixed order: a result does not depend on where the matrix lies or what else is computed.
#include "format.cuh"

#ifndef ROWS
#define ROWS 4
#endif
#ifndef UNROLL
#define UNROLL 8
#endif
#ifndef OUTPUT
#define OUTPUT FLOAT
#endif
// CONSTANT: 1 where the matrix is the only one and never written: its first weights are asked for before the kernels that
// prepare its input have ended, the others brought near.
#ifndef CONSTANT
#define CONSTANT 0
#endif
// COLUMNS: of the matrix; a constant, so that the loop over steps is unrolled and its addresses are offsets.
#ifndef TOKENS
#define TOKENS 1   // vectors that share one reading of a matrix
#endif

struct Weights {
    uint4 words;
#if KIND == AFFINE
#if BITS == 3
    uint2 high;
#endif
#if META == 8
    unsigned meta[UNITS > 1 ? UNITS / 2 : 1];  // two bytes a unit
    float4 steps;
#else
    unsigned scales[UNITS];                    // half2
#endif
#elif KIND == CODEBOOK
    float scale;
#endif
};

// EXACT: the rows fill every block.
#ifdef EXACT
#define ROW(r) (row0 + r)
#else
#define ROW(r) min(row0 + r, rows - 1)
#endif

struct Matrix {
    const char* words;
    const char* high;
    const char* scales;
    const char* steps;   // of 8-bit metadata
    static constexpr int columns = COLUMNS;
};

__device__ __forceinline__ Weights load_weights(const Matrix& m, long long row, int c) {
    Weights w;
    const int chunks = m.columns / CHUNK;
    w.words = load_stream((const uint4*)m.words + row * chunks + c);
#if KIND == AFFINE
#if BITS == 3
    w.high = __ldg((const uint2*)m.high + row * chunks + c);
#endif
    const int groups = m.columns / GROUP;
    const long long g = row * groups + (long long)c * CHUNK / GROUP;
#if META == 8
    const unsigned short* meta = (const unsigned short*)m.scales + g;
    if (UNITS == 1) w.meta[0] = *meta;
#pragma unroll
    for (int u = 0; u < UNITS / 2; u++) w.meta[u] = ((const unsigned*)meta)[u];
    const int blocks = (groups + 127) / 128;
    w.steps = *((const float4*)m.steps + row * blocks + (c * CHUNK / GROUP) / 128);
#else
    const unsigned* scales = (const unsigned*)m.scales + g;
#pragma unroll
    for (int u = 0; u < UNITS; u++) w.scales[u] = scales[u];
#endif
#elif KIND == CODEBOOK
    w.scale = half_to_float(((const unsigned short*)m.scales)[row * (m.columns / GROUP) + c * CHUNK / GROUP]);
#endif
    return w;
}

__device__ __forceinline__ unsigned word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

#if KIND == AFFINE || KIND == SIGNED
// The chunk's 4 * FIELDS groups of four codes, a code per byte; group w * FIELDS + i holds every FIELDS-th column of word w.
struct Codes { unsigned four[4 * FIELDS]; };

__device__ __forceinline__ Codes expand(const Weights& w) {
    Codes codes;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned word = word_of(w.words, i);
#pragma unroll
        for (int f = 0; f < FIELDS; f++) {
#if KIND == SIGNED || BITS == 8
            codes.four[i] = word;
#elif BITS == 4
            codes.four[i * FIELDS + f] = (word >> (4 * f)) & 0x0F0F0F0Fu;
#elif BITS == 2
            codes.four[i * FIELDS + f] = (word >> (2 * f)) & 0x03030303u;
#else
            const unsigned high = i < 2 ? w.high.x : w.high.y;   // 32 columns a word: two words of the low plane
            codes.four[i * FIELDS + f] = ((word >> (2 * f)) & 0x03030303u) |
                                         (((high >> (4 * (i & 1) + f)) & 0x01010101u) << 2);
#endif
        }
    }
    return codes;
}

// Sum over a unit of code * number, exactly: `x` is the chunk's prepared activations.
__device__ __forceinline__ int dot(const Codes& codes, const int* x, int unit) {
    int high = 0, low = 0;
    constexpr int WORDS = 4 / UNITS;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
#pragma unroll
        for (int f = 0; f < FIELDS; f++) {
            const int word = unit * WORDS + i;
            const unsigned four = codes.four[word * FIELDS + f];
            const int* numbers = x + word * 2 * FIELDS;
#if KIND == SIGNED
            high = dp4a_ss((int)four, numbers[f], high);
            low = dp4a_ss((int)four, numbers[FIELDS + f], low);
#else
            high = dp4a_us(four, numbers[f], high);
            low = dp4a_us(four, numbers[FIELDS + f], low);
#endif
        }
    }
    return high * 256 + low;
}
#endif

#if KIND == AFFINE
__device__ __forceinline__ float2 scale_zero(const Weights& w, int unit) {
#if META == 8
    const unsigned pair = w.meta[unit / 2] >> (16 * (unit & 1));
    return make_float2(fmaf((float)(pair & 255u), w.steps.x, w.steps.y), fmaf((float)((pair >> 8) & 255u), w.steps.z, w.steps.w));
#else
    return h2_to_float2(w.scales[unit]);
#endif
}
#endif

#if KIND == CODEBOOK
// Every pair of codes that a byte can hold, once per lane: no two lanes of a warp ask the same bank. 32 KiB.
__shared__ unsigned pairs[256 * 32];

__device__ __forceinline__ void fill_pairs(const float* codebook) {
    for (int i = threadIdx.x; i < 256 * 32; i += blockDim.x) {
        const int byte = i >> 5;
        pairs[i] = float2_to_h2(codebook[byte & 15], codebook[byte >> 4]);
    }
    __syncthreads();
}
#endif

// Adds a chunk's share of the product to `sum`. `x`: the chunk's prepared activations in registers.
__device__ __forceinline__ float multiply(const Weights& w,
#if KIND == AFFINE || KIND == SIGNED
                                          const Codes& codes,
#endif
                                          const uint4* x, float x_scale, const float* x_sums, float sum) {
#if KIND == AFFINE
    float part = 0.f;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        const float2 sz = scale_zero(w, u);
        part = fmaf(sz.x, fmaf(-sz.y, x_sums[u], (float)dot(codes, (const int*)x, u)), part);
    }
    return fmaf(part, x_scale, sum);
#elif KIND == SIGNED
    return fmaf((float)dot(codes, (const int*)x, 0), x_scale, sum);
#elif KIND == CODEBOOK
    const unsigned lane = threadIdx.x & 31;
    const unsigned* numbers = (const unsigned*)x;
    float part = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned word = word_of(w.words, i);
        unsigned four = 0u;
#pragma unroll
        for (int b = 0; b < 4; b++) four = h2_fma(pairs[((word >> (8 * b)) & 255u) * 32 + lane], numbers[i * 4 + b], four);
        const float2 two = h2_to_float2(four);
        part += two.x + two.y;
    }
    return fmaf(part, w.scale * x_scale, sum);
#else
    const float* numbers = (const float*)x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned word = word_of(w.words, i);
#if DTYPE == FLOAT
        sum = fmaf(__uint_as_float(word), numbers[i], sum);
#else
#if DTYPE == HALF
        const float2 two = h2_to_float2(word);
#else
        const float2 two = make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u));
#endif
        sum = fmaf(two.x, numbers[2 * i], sum);
        sum = fmaf(two.y, numbers[2 * i + 1], sum);
#endif
    }
    return sum;
#endif
}

__device__ __forceinline__ void store(void* out, long long i, float v) {
#if OUTPUT == FLOAT
    ((float*)out)[i] = v;
#elif OUTPUT == HALF
    ((unsigned short*)out)[i] = float_to_half(v);
#else
    ((unsigned short*)out)[i] = float_to_bf16(v);
#endif
}

// pool, stride, buffers: matrix of job j starts at pool + buffers[j] * stride + the offsets; buffers null: at pool.
// starts, choices: TOKENS > 1: the choices of job j are choices[starts[j]..starts[j + 1]), at most TOKENS are taken
// at a time; TOKENS == 1: choice j is job j. A choice reads activation row choice / share and writes its own row of out.
// x, x_scales, x_sums: prepared by `prepare`; one row each per activation row.
// from, to: of one token, the rows [from[j], to[j]) of choice j that are computed, both at multiples of ROWS; null: the first,
// and the last. only_if: nothing is computed where it is 0; null: always.
extern "C" __global__ void __launch_bounds__(256)
gemv(const char* pool, long long stride, const int* buffers, const int* starts, const int* choices, long long share,
     long long words, long long high, long long scales, long long steps, long long bias, const float* codebook,
     const uint4* x, const float* x_scales, const float* x_sums, void* out, long long rows, const int* from, const int* to,
     const int* only_if) {
    let_next_begin();
#if !CONSTANT
    wait_for_previous();
#endif
    constexpr int chunks = COLUMNS / CHUNK, padded = (chunks + 31) / 32 * 32, steps_of_lane = padded / 32;
    const int job = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const long long row0 = ((long long)blockIdx.x * (blockDim.x >> 5) + warp) * ROWS;
#if TOKENS == 1 && !CONSTANT
    if (only_if && !*only_if) return;
    const long long block0 = (long long)blockIdx.x * (blockDim.x >> 5) * ROWS, block1 = block0 + (blockDim.x >> 5) * ROWS;
    if ((from && block1 <= from[job]) || (to && block0 >= to[job])) return;
#endif
#if KIND == CODEBOOK
    fill_pairs(codebook);
#endif
#if TOKENS == 1 && !CONSTANT
    if ((from && row0 < from[job]) || (to && row0 >= to[job])) return;
#endif
#if TOKENS > 1
    const int first = starts[job], last = starts[job + 1];
    if (first == last) return;
#else
    const int first = job, last = job + 1;
#endif
    const char* blob = pool + (buffers ? buffers[job] : 0) * stride;
    const Matrix m = {blob + words, blob + high, blob + scales, blob + steps};
    if (row0 >= rows) return;   // a block's other warps wait
#if CONSTANT
    // One line of 128 bytes a lane: eight lanes' pieces.
#pragma unroll
    for (int step = 1; step < steps_of_lane; step++)
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (lane % 8 == 0 && lane + 32 * step < chunks)
                prefetch((const uint4*)m.words + ROW(r) * chunks + lane + 32 * step);
#endif

    for (int begin = first; begin < last; begin += TOKENS) {
        float sums[TOKENS][ROWS];
        int source[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
#if TOKENS > 1
            source[t] = choices[min(begin + t, last - 1)] / (int)share;   // beyond the end the last one is repeated, not stored
#else
            source[t] = share == 1 ? job : 0;   // one token: all choices share its vector, or each has its own
#endif
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[t][r] = 0.f;
        }
        Weights next[ROWS];
        if (chunks % 32 == 0 || lane < chunks)
#pragma unroll
            for (int r = 0; r < ROWS; r++) next[r] = load_weights(m, ROW(r), lane);
#if CONSTANT
        if (begin == first) wait_for_previous();
#endif
#pragma unroll UNROLL
        for (int step = 0; step < steps_of_lane; step++) {
            const int c = lane + 32 * step;
            if (chunks % 32 != 0 && c >= chunks) break;
            Weights w[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) w[r] = next[r];
            if (step + 1 < steps_of_lane && (chunks % 32 == 0 || c + 32 < chunks))
#pragma unroll
                for (int r = 0; r < ROWS; r++) next[r] = load_weights(m, ROW(r), c + 32);
#if TOKENS > 1 && (KIND == AFFINE || KIND == SIGNED)
            Codes codes[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) codes[r] = expand(w[r]);
#endif
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                uint4 numbers[VECTORS];
                const uint4* row = x + (long long)source[t] * padded * VECTORS;
#pragma unroll
                for (int v = 0; v < VECTORS; v++) numbers[v] = row[lane + (step * VECTORS + v) * 32];
                float x_sum[UNITS];
                float x_scale = 0.f;
#if KIND != DENSE
                x_scale = x_scales[(long long)source[t] * chunks + c];
#endif
#if KIND == AFFINE
#pragma unroll
                for (int u = 0; u < UNITS; u++) x_sum[u] = x_sums[((long long)source[t] * chunks + c) * UNITS + u];
#endif
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#if KIND == AFFINE || KIND == SIGNED
#if TOKENS > 1
                    sums[t][r] = multiply(w[r], codes[r], numbers, x_scale, x_sum, sums[t][r]);
#else
                    sums[t][r] = multiply(w[r], expand(w[r]), numbers, x_scale, x_sum, sums[t][r]);
#endif
#else
                    sums[t][r] = multiply(w[r], numbers, x_scale, x_sum, sums[t][r]);
#endif
            }
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float sum = sums[t][r];
#pragma unroll
                for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, o);
                if (lane == 0 && row0 + r < rows && begin + t < last) {
#if TOKENS > 1
                    const long long choice = choices[begin + t];
#else
                    const long long choice = job;
#endif
#if KIND == SIGNED
                    sum *= ((const float*)m.scales)[row0 + r];
#endif
                    if (bias >= 0) sum += ((const float*)(blob + bias))[row0 + r];
                    store(out, choice * rows + row0 + r, sum);
                }
            }
    }
}
