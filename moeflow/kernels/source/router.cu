// A linear router and its choice of experts for a few tokens, in one launch where torch needs nine.
//
//   ELEMENT   of the hidden states; MATRIX: FLOAT or the same: of the router's weights and of its logits
//   EXPERTS, CHOICES, COLUMNS   experts, how many of them a token gets, width of the hidden states
//   FIRST     SCORES: softmax over all experts, then the largest; CHOICE: the largest logits, then softmax over them
//   NORMALIZE 1: divided by their sum
//   WEIGHT    numbers of the weights that leave
//
// Of equal scores the expert of the lower index comes first.
#include "collectives.cuh"
#include "elements.cuh"

#define SCORES 0
#define CHOICE 1

constexpr int WARPS = 8, OWN = (EXPERTS + 31) / 32;   // experts a lane holds
constexpr bool ALONE = EXPERTS <= WARPS;              // one block computes all logits of a token

// Eight numbers of the matrix, as they lie in memory.
#if MATRIX == ELEMENT
using Row = Raw;
__device__ __forceinline__ Row load_row(const void* matrix, long long at) { return load_eight(matrix, at); }
__device__ __forceinline__ void numbers_of(const Row& row, float* out) { unpack_eight(row, out); }
#else
struct Row { float4 low, high; };
__device__ __forceinline__ Row load_row(const void* matrix, long long at) {
    const float4* from = (const float4*)((const float*)matrix + at);
    return {from[0], from[1]};
}
__device__ __forceinline__ void numbers_of(const Row& row, float* out) {
    out[0] = row.low.x; out[1] = row.low.y; out[2] = row.low.z; out[3] = row.low.w;
    out[4] = row.high.x; out[5] = row.high.y; out[6] = row.high.z; out[7] = row.high.w;
}
#endif
constexpr int STEPS = (COLUMNS + 255) / 256, AHEAD = STEPS < 16 ? STEPS : 16;

__device__ __forceinline__ float as_matrix(float value) {
#if MATRIX == ELEMENT
    return rounded(value);
#else
    return value;
#endif
}
__device__ __forceinline__ void store_logit(void* out, long long at, float value) {
#if MATRIX == ELEMENT
    store_one(out, at, value);
#else
    ((float*)out)[at] = value;
#endif
}
__device__ __forceinline__ void store_weight(void* out, long long at, float value) {
#if WEIGHT == FLOAT
    ((float*)out)[at] = value;
#elif WEIGHT == HALF
    ((unsigned short*)out)[at] = float_to_half(value);
#else
    ((unsigned short*)out)[at] = float_to_bf16(value);
#endif
}

// One warp chooses for one token. logits [EXPERTS] in float32, as rounded.
__device__ __forceinline__ void choose(const float* logits, long long token, void* weights, long long* index, int lane) {
    float score[OWN];
    float most = negative_infinity(), sum = 0.f;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int e = 32 * i + lane;
        score[i] = e < EXPERTS ? (ALONE ? logits[e] : __ldcg(logits + e)) : negative_infinity();
        most = fmaxf(most, score[i]);
    }
    most = warp_max(most);
#if FIRST == SCORES
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        score[i] = 32 * i + lane < EXPERTS ? expf(score[i] - most) : negative_infinity();
        if (32 * i + lane < EXPERTS) sum += score[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < OWN; i++) if (32 * i + lane < EXPERTS) score[i] /= sum;
#endif
    float mine = 0.f, chosen = 0.f;   // lane k keeps the k-th choice
    int expert = 0;
    for (int k = 0; k < CHOICES; k++) {
        float best = negative_infinity();
        int who = EXPERTS;
#pragma unroll
        for (int i = 0; i < OWN; i++)
            if (score[i] > best || (who == EXPERTS && 32 * i + lane < EXPERTS && score[i] == best)) { best = score[i]; who = 32 * i + lane; }
#pragma unroll
        for (int o = 16; o; o >>= 1) {
            const float other = __shfl_xor_sync(0xFFFFFFFFu, best, o);
            const int its = __shfl_xor_sync(0xFFFFFFFFu, who, o);
            if (other > best || (other == best && its < who)) { best = other; who = its; }
        }
        // Where all that is left is no number, nobody wins: an expert that exists is named all the same.
#pragma unroll
        for (int i = 0; i < OWN; i++) if (32 * i + lane == who) score[i] = negative_infinity();
        if (lane == k) { mine = best; expert = who < EXPERTS ? who : k; }
    }
#if FIRST == CHOICE
    mine = lane < CHOICES ? expf(mine - most) : 0.f;   // the first choice is the largest of all
    chosen = warp_sum(mine);
    mine /= chosen;
#elif NORMALIZE
    chosen = warp_sum(lane < CHOICES ? mine : 0.f);
    mine /= chosen;
#endif
    if (lane < CHOICES) {
        index[token * CHOICES + lane] = expert;
        store_weight(weights, token * CHOICES + lane, mine);
    }
}

// x [T, COLUMNS], matrix [EXPERTS, COLUMNS], bias [EXPERTS] or null; logits [T, EXPERTS] as the module gives them, and in
// float32 in `exact`; weights and index [T, CHOICES]. A warp an expert, a token per blockIdx.y; the last block of a token
// to finish chooses. finished [T] is zero between launches.
extern "C" __global__ void __launch_bounds__(256)
route(const void* x, const void* matrix, const void* bias, void* logits, float* exact, int* finished, void* weights,
      long long* index) {
    let_next_begin();
    __shared__ int last;
    __shared__ float own[WARPS];
    const int lane = threadIdx.x & 31, expert = blockIdx.x * WARPS + (threadIdx.x >> 5), token = blockIdx.y;
    // The matrix does not depend on anything before: up to 4,096 columns of it are here when x is.
    Row rows[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (expert < EXPERTS && lane * 8 + 256 * i < COLUMNS) rows[i] = load_row(matrix, (long long)expert * COLUMNS + lane * 8 + 256 * i);
    wait_for_previous();
    if (expert < EXPERTS) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int column = lane * 8 + 256 * i;
            if (column >= COLUMNS) break;
            float a[8], b[8];
            unpack_eight(load_eight(x, (long long)token * COLUMNS + column), a);
            numbers_of(rows[i], b);
#pragma unroll
            for (int j = 0; j < 8; j++) sum = fmaf(a[j], b[j], sum);
        }
#pragma unroll 4
        for (int column = lane * 8 + 256 * AHEAD; column < COLUMNS; column += 256) {
            float a[8], b[8];
            unpack_eight(load_eight(x, (long long)token * COLUMNS + column), a);
            numbers_of(load_row(matrix, (long long)expert * COLUMNS + column), b);
#pragma unroll
            for (int j = 0; j < 8; j++) sum = fmaf(a[j], b[j], sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            if (bias) {
#if MATRIX == ELEMENT
                sum += load_one(bias, expert);
#else
                sum += ((const float*)bias)[expert];
#endif
            }
            sum = as_matrix(sum);
            store_logit(logits, (long long)token * EXPERTS + expert, sum);
            if (ALONE) own[expert] = sum;
            else exact[(long long)token * EXPERTS + expert] = sum;
        }
    }
    __syncthreads();
    if (ALONE) {
        if (threadIdx.x < 32) choose(own, token, weights, index, lane);
        return;
    }
    if (threadIdx.x == 0) {
        __threadfence();   // the whole block's logits, as the barrier ordered them before this
        last = atomicAdd(finished + token, 1) == (int)gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last || threadIdx.x >= 32) return;
    if (lane == 0) finished[token] = 0;   // for the next launch
    choose(exact + (long long)token * EXPERTS, token, weights, index, lane);
}
