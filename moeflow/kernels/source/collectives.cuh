// What a warp or a block agrees on: sums and largest values, the same in every thread, in a fixed order.
#pragma once
#include "primitives.cuh"

__device__ __forceinline__ float negative_infinity() { return __uint_as_float(0xFF800000u); }

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int o = 16; o; o >>= 1) value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, o));
    return value;
}
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int o = 16; o; o >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, o);
    return value;
}

// Called once in a kernel: the shared memory is not waited for again.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float sums[32];
    const int lane = threadIdx.x & 31, warps = ((int)blockDim.x + 31) / 32;
    value = warp_sum(value);
    if (lane == 0) sums[threadIdx.x >> 5] = value;
    __syncthreads();
    return warp_sum(lane < warps ? sums[lane] : 0.f);
}
