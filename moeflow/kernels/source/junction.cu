// What stands between two products of a decoding step, in one launch: the sum of the experts, the residual connection,
// an RMS norm, and the layout that the next product reads. A token a block; roundings are transformers' own.
//
//   ELEMENT      the model's numbers, as for elements.cuh
//   ADD          NOTHING, TENSOR or EXPERTS: what is added to the residual stream
//   WEIGHT       numbers of the router's weights: FLOAT, HALF or BFLOAT
//   COLUMNS      of a row; EACH: groups of eight of them that a thread holds
//   LATE         1: the norm is rounded once, after its weight; 0: before it as well
//   LAY_OUT      1: for the packed format that format.cuh's macros name
#include "collectives.cuh"
#include "elements.cuh"
#include "lay_out.cuh"

#define NOTHING 0
#define TENSOR 1
#define EXPERTS 2

__device__ __forceinline__ float weight_at(const void* weights, long long i) {
#if WEIGHT == FLOAT
    return ((const float*)weights)[i];
#elif WEIGHT == HALF
    return half_to_float(((const unsigned short*)weights)[i]);
#else
    return bf16_to_float(((const unsigned short*)weights)[i]);
#endif
}

// The router's weighted sum of eight columns, in its order, rounded once.
__device__ __forceinline__ void add_experts(const float* results, const void* weights, int token, int top_k, int column,
                                            float* out) {
    float sum[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int k = 0; k < top_k; k++) {
        const long long choice = (long long)token * top_k + k;
        const float weight = weight_at(weights, choice);
        const float4* from = (const float4*)(results + choice * COLUMNS + column);
        const float4 a = from[0], b = from[1];
        const float y[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] = fmaf(weight, y[j], sum[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) out[j] = rounded(sum[j]);
}

constexpr int GROUPS = COLUMNS / 8;
#if LAY_OUT
constexpr int CHUNKS = COLUMNS / CHUNK, PIECES = (CHUNKS + 31) / 32 * 32 * VECTORS;
__shared__ uint4 staged[PIECES];   // bytes are gathered here: written one by one they would cross the chip so
#endif

// residual, added [T, COLUMNS]; results [T * top_k, COLUMNS] and weights [T, top_k]; scale [COLUMNS] of the norm.
// total [T, COLUMNS]: the new residual stream; normal [T, COLUMNS]; pieces, scales, sums as `prepare` writes them.
extern "C" __global__ void __launch_bounds__(1024)
junction(const void* residual, const void* added, const float* results, const void* weights, long long top_k,
         const void* scale, void* total, void* normal, uint4* pieces, float* scales, float* sums, float eps) {
    let_next_begin();
    Raw by[EACH];   // the norm's weight does not depend on anything before
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int group = i * (int)blockDim.x + threadIdx.x;
        by[i] = group < GROUPS ? load_eight(scale, group * 8) : no_numbers();
    }
    wait_for_previous();
    const int token = blockIdx.x;
    const long long row = (long long)token * COLUMNS;
    float v[EACH][8];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int group = i * (int)blockDim.x + threadIdx.x;
        const bool inside = group < GROUPS;
        unpack_eight(inside ? load_eight(residual, row + group * 8) : no_numbers(), v[i]);
#if ADD != NOTHING
        if (inside) {
            float more[8];
#if ADD == TENSOR
            unpack_eight(load_eight(added, row + group * 8), more);
#else
            add_experts(results, weights, token, (int)top_k, group * 8, more);
#endif
#pragma unroll
            for (int j = 0; j < 8; j++) v[i][j] = rounded(add_rn(v[i][j], more[j]));
            store_eight(total, row + group * 8, pack_eight(v[i]));
        }
#endif
#pragma unroll
        for (int j = 0; j < 8; j++) squares = fmaf(v[i][j], v[i][j], squares);
    }
    const float factor = rsqrtf(block_sum(squares) / (float)COLUMNS + eps);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int group = i * (int)blockDim.x + threadIdx.x;
        const bool inside = group < GROUPS;
        float weight[8];
        unpack_eight(by[i], weight);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float plain = mul_rn(v[i][j], factor);
            v[i][j] = rounded(mul_rn(weight[j], LATE ? plain : rounded(plain)));
        }
        if (inside) store_eight(normal, row + group * 8, pack_eight(v[i]));
#if LAY_OUT
        lay_out(v[i], group * 8, inside, staged, scales + (long long)token * CHUNKS, sums + (long long)token * CHUNKS * UNITS);
#endif
    }
#if LAY_OUT
    __syncthreads();
    uint4* target = pieces + (long long)token * PIECES;
    for (int i = threadIdx.x; i < PIECES; i += (int)blockDim.x) target[i] = staged[i];
#endif
}
