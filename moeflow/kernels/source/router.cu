// A linear router and its choice of experts for a few tokens, in one launch where torch needs nine.
//
//   ELEMENT   of the hidden states; MATRIX: FLOAT or the same: of the router's weights and of its logits
//   EXPERTS, CHOICES, COLUMNS   experts, how many of them a token gets, width of the hidden states
//   FIRST     SCORES: softmax over all experts, then the largest; CHOICE: the largest logits, then softmax over them
//   NORMALIZE 1: divided by their sum
//   WEIGHT    numbers of the weights that leave
//
// Of equal scores the expert of the lower index comes first.
#include "elements.cuh"

#define SCORES 0
#define CHOICE 1

constexpr int WARPS = 8, OWN = (EXPERTS + 31) / 32;   // experts a lane holds
constexpr bool ALONE = EXPERTS <= WARPS;              // one block computes all logits of a token

__device__ __forceinline__ void load_weights_eight(const void* matrix, long long at, float* out) {
#if MATRIX == ELEMENT
    unpack_eight(load_eight(matrix, at), out);
#else
    const float4* from = (const float4*)((const float*)matrix + at);
    const float4 a = from[0], b = from[1];
    out[0] = a.x; out[1] = a.y; out[2] = a.z; out[3] = a.w;
    out[4] = b.x; out[5] = b.y; out[6] = b.z; out[7] = b.w;
#endif
}

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

__device__ __forceinline__ float all_max(float value) {
#pragma unroll
    for (int o = 16; o; o >>= 1) value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, o));
    return value;
}
__device__ __forceinline__ float all_sum(float value) {
#pragma unroll
    for (int o = 16; o; o >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, o);
    return value;
}
__device__ __forceinline__ float lowest() { return __uint_as_float(0xFF800000u); }   // -infinity

// One warp chooses for one token. logits [EXPERTS] in float32, as rounded.
__device__ __forceinline__ void choose(const float* logits, long long token, void* weights, long long* index, int lane) {
    float score[OWN];
    float most = lowest(), sum = 0.f;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int e = 32 * i + lane;
        score[i] = e < EXPERTS ? (ALONE ? logits[e] : __ldcg(logits + e)) : lowest();
        most = fmaxf(most, score[i]);
    }
    most = all_max(most);
#if FIRST == SCORES
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        score[i] = 32 * i + lane < EXPERTS ? expf(score[i] - most) : lowest();
        if (32 * i + lane < EXPERTS) sum += score[i];
    }
    sum = all_sum(sum);
#pragma unroll
    for (int i = 0; i < OWN; i++) if (32 * i + lane < EXPERTS) score[i] /= sum;
#endif
    float mine = 0.f, chosen = 0.f;   // lane k keeps the k-th choice
    int expert = 0;
    for (int k = 0; k < CHOICES; k++) {
        float best = lowest();
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
        for (int i = 0; i < OWN; i++) if (32 * i + lane == who) score[i] = lowest();
        if (lane == k) { mine = best; expert = who < EXPERTS ? who : k; }
    }
#if FIRST == CHOICE
    mine = lane < CHOICES ? expf(mine - most) : 0.f;   // the first choice is the largest of all
    chosen = all_sum(mine);
    mine /= chosen;
#elif NORMALIZE
    chosen = all_sum(lane < CHOICES ? mine : 0.f);
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
    wait_for_previous();
    __shared__ int last;
    __shared__ float own[WARPS];
    const int lane = threadIdx.x & 31, expert = blockIdx.x * WARPS + (threadIdx.x >> 5), token = blockIdx.y;
    if (expert < EXPERTS) {
        float sum = 0.f;
#pragma unroll 16
        for (int i = lane * 8; i < COLUMNS; i += 256) {
            float a[8], b[8];
            unpack_eight(load_eight(x, (long long)token * COLUMNS + i), a);
            load_weights_eight(matrix, (long long)expert * COLUMNS + i, b);
#pragma unroll
            for (int j = 0; j < 8; j++) sum = fmaf(a[j], b[j], sum);
        }
        sum = all_sum(sum);
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
