// The small operations of a decoding step between the products: one launch each where torch needs four to ten.
// Roundings are transformers' own, in the same places; sums are float32.
#include "collectives.cuh"
#include "elements.cuh"

// rms_norm: y = weight * (x / sqrt(mean(x^2) + eps)), a row a block, the row in registers.
//   VECTORS  groups of eight numbers that a thread holds
//   LATE     1: rounded once, after the weight (gpt-oss); 0: before it as well
#ifndef VECTORS
#define VECTORS 1
#endif
#ifndef LATE
#define LATE 0
#endif

extern "C" __global__ void __launch_bounds__(1024)
rms_norm(const void* x, const void* weight, void* y, long long columns_, float eps) {
    let_next_begin();
    wait_for_previous();
    const int columns = (int)columns_, groups = columns / 8;
    const long long row = (long long)blockIdx.x * columns;
    float v[VECTORS][8];
    Raw scales[VECTORS];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int group = i * (int)blockDim.x + threadIdx.x;
        const bool inside = group < groups;
        unpack_eight(inside ? load_eight(x, row + group * 8) : no_numbers(), v[i]);
        scales[i] = inside ? load_eight(weight, group * 8) : no_numbers();
#pragma unroll
        for (int j = 0; j < 8; j++) squares = fmaf(v[i][j], v[i][j], squares);
    }
    const float factor = rsqrtf(block_sum(squares) / (float)columns + eps);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int group = i * (int)blockDim.x + threadIdx.x;
        float scale[8];
        unpack_eight(scales[i], scale);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float normal = mul_rn(v[i][j], factor);
            v[i][j] = mul_rn(scale[j], LATE ? normal : rounded(normal));
        }
        if (group < groups) store_eight(y, row + group * 8, pack_eight(v[i]));
    }
}

// rotate: x * cos + rotate_half(x) * sin for query and key, a pair of numbers a thread. q [Hq, T, D] and k [Hk, T, D] by
// their strides, results [T, H, D]; cos and sin [T, table], where table is D, or D / 2 for both halves.
extern "C" __global__ void __launch_bounds__(256)
rotate(const void* q, const void* k, const void* cosine, const void* sine, void* q_out, void* k_out, long long q_heads,
       long long k_heads, long long tokens, long long width, long long table, long long q_head, long long q_token,
       long long k_head, long long k_token) {
    let_next_begin();
    wait_for_previous();
    const int half = (int)width / 2, heads = (int)(q_heads + k_heads);
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= heads * (int)tokens * half) return;
    const int i = index % half, head = index / half % heads, token = index / half / heads;
    const bool query = head < (int)q_heads;
    const int own = query ? head : head - (int)q_heads;
    const void* from = query ? q : k;
    const long long at = query ? own * q_head + token * q_token : own * k_head + token * k_token;
    const int second = table == width ? half : 0;
    const float a = load_one(from, at + i), b = load_one(from, at + i + half);
    const float cos_a = load_one(cosine, token * table + i), cos_b = load_one(cosine, token * table + i + second);
    const float sin_a = load_one(sine, token * table + i), sin_b = load_one(sine, token * table + i + second);
    const long long to = ((long long)token * (query ? q_heads : k_heads) + own) * width + i;
    void* out = query ? q_out : k_out;
    store_one(out, to, add_rn(rounded(mul_rn(a, cos_a)), rounded(mul_rn(-b, sin_a))));
    store_one(out, to + half, add_rn(rounded(mul_rn(b, cos_b)), rounded(mul_rn(a, sin_b))));
}

// append: new keys [H, T, K] and values [H, T, V] into static buffers [H, capacity, .] from *length on, then *length += T.
// One block, so that nobody reads the length after it was moved. What has no room is not written.
extern "C" __global__ void __launch_bounds__(1024)
append(const void* k, const void* v, void* keys, void* values, long long* length, long long heads, long long tokens,
       long long capacity, long long k_width, long long v_width, long long k_head, long long k_token, long long v_head,
       long long v_token) {
    let_next_begin();
    wait_for_previous();
    const long long start = *length;
    __syncthreads();
    const int k_groups = (int)k_width / 8, row = k_groups + (int)v_width / 8;
    for (int index = threadIdx.x; index < (int)(heads * tokens) * row; index += (int)blockDim.x) {
        const int group = index % row, token = index / row % (int)tokens, head = index / row / (int)tokens;
        const long long slot = head * capacity + start + token;
        if (start + token >= capacity) continue;
        if (group < k_groups)
            store_eight(keys, slot * k_width + group * 8, load_eight(k, head * k_head + token * k_token + group * 8));
        else
            store_eight(values, slot * v_width + (group - k_groups) * 8,
                        load_eight(v, head * v_head + token * v_token + (group - k_groups) * 8));
    }
    if (threadIdx.x == 0) *length = start + tokens;
}
