// Activations on their way into and out of packed matrices: prepared for `gemv`, gated between the two of an expert,
// and summed by the router's weights.
#include "lay_out.cuh"

// What `prepare` reads: INPUT as it is, or the two halves of a gate_up product through the expert's activation.
#define PLAIN 0
#define SILU 1
#define GELU 2
#define GELU_TANH 3
#define RELU 4
#define CLAMPED 5     // gpt-oss: clamped, sigmoid(alpha * gate), up + 1, gate and up interleaved

#ifndef GATE
#define GATE PLAIN
#endif
#ifndef INPUT
#define INPUT FLOAT
#endif

__device__ __forceinline__ float element(const void* x, long long i) {
#if INPUT == FLOAT
    return ((const float*)x)[i];
#elif INPUT == HALF
    return half_to_float(((const unsigned short*)x)[i]);
#else
    return bf16_to_float(((const unsigned short*)x)[i]);
#endif
}

__device__ __forceinline__ float activation(float g) {
#if GATE == SILU
    return g / (1.f + expf(-g));
#elif GATE == GELU
    return 0.5f * g * (1.f + erff(g * 0.70710678118654752f));
#elif GATE == GELU_TANH
    return 0.5f * g * (1.f + tanhf(0.79788456080286536f * (g + 0.044715f * g * g * g)));
#elif GATE == RELU
    return fmaxf(g, 0.f);
#else
    return g;
#endif
}

// Not a number stays one: fmaxf and fminf would drop it.
__device__ __forceinline__ float clamp_high(float v, float limit) { return v > limit ? limit : v; }
__device__ __forceinline__ float clamp_low(float v, float limit) { return v < limit ? limit : v; }

__device__ __forceinline__ float gated(const void* x, long long row, int column, int columns, float limit, float alpha) {
#if GATE == PLAIN
    return element(x, row * columns + column);
#elif GATE == CLAMPED
    const long long i = 2 * (row * columns + column);
    const float gate = clamp_high(element(x, i), limit);
    const float up = clamp_low(clamp_high(element(x, i + 1), limit), -limit);
    return (up + 1.f) * (gate / (1.f + expf(-alpha * gate)));
#else
    const long long i = 2 * row * columns + column;
    return activation(element(x, i)) * element(x, i + columns);
#endif
}

// Lays rows out for `gemv`: x [rows, columns] (or gate_up [rows, 2 * columns]) to pieces, scales and sums. Four columns a
// thread, a row per blockIdx.y; the threads of a chunk lie in one warp.
extern "C" __global__ void __launch_bounds__(256)
prepare(const void* x, uint4* pieces, float* scales, float* sums, long long columns_, float limit, float alpha) {
    const int columns = (int)columns_, row = blockIdx.y;
    const int quad = blockIdx.x * blockDim.x + threadIdx.x;
    const int chunks = columns / CHUNK, padded = (chunks + 31) / 32 * 32;
    const bool inside = quad * 4 < columns;
    float v[4] = {0.f, 0.f, 0.f, 0.f};
    if (inside)
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = gated(x, row, quad * 4 + i, columns, limit, alpha);
    lay_out(v, quad * 4, inside, pieces + (long long)row * padded * VECTORS, scales + (long long)row * chunks,
            sums + (long long)row * chunks * UNITS);
}

// out[t] = sum over i of weights[t, i] * y[t * top_k + i], in the router's order, in float32, rounded once to OUTPUT.
#ifndef OUTPUT
#define OUTPUT FLOAT
#endif
#ifndef WEIGHT
#define WEIGHT FLOAT
#endif
extern "C" __global__ void __launch_bounds__(256)
combine(const float* y, const void* weights, void* out, long long top_k, long long columns) {
    const long long column = (long long)blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (column >= columns) return;
    float sum = 0.f;
    for (int i = 0; i < (int)top_k; i++) {
        const long long choice = row * top_k + i;
#if WEIGHT == FLOAT
        const float weight = ((const float*)weights)[choice];
#elif WEIGHT == HALF
        const float weight = half_to_float(((const unsigned short*)weights)[choice]);
#else
        const float weight = bf16_to_float(((const unsigned short*)weights)[choice]);
#endif
        sum = fmaf(weight, y[choice * columns + column], sum);
    }
#if OUTPUT == FLOAT
    ((float*)out)[row * columns + column] = sum;
#elif OUTPUT == HALF
    ((unsigned short*)out)[row * columns + column] = float_to_half(sum);
#else
    ((unsigned short*)out)[row * columns + column] = float_to_bf16(sum);
#endif
}
