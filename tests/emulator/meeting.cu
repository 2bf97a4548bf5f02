// Threads that meet: shuffles and votes of a warp, a block's sum through shared memory, atomics of all blocks.
#include "primitives.cuh"

constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

// T, WIDTH: macros. out [5, blockDim]: shuffles by index, up, down, xor, and xor in two halves of a warp.
#ifdef T
extern "C" __global__ void shuffles(const T* x, const int* by, T* out) {
    const int t = threadIdx.x, n = blockDim.x;
    const T v = x[t];
    out[t] = __shfl_sync(ALL_LANES, v, by[t], WIDTH);
    out[n + t] = __shfl_up_sync(ALL_LANES, v, (unsigned)by[0], WIDTH);
    out[2 * n + t] = __shfl_down_sync(ALL_LANES, v, (unsigned)by[0], WIDTH);
    out[3 * n + t] = __shfl_xor_sync(ALL_LANES, v, by[0], WIDTH);
    if (t & 16) out[4 * n + t] = __shfl_xor_sync(0xFFFF0000u, v, 3);
    else out[4 * n + t] = __shfl_xor_sync(0x0000FFFFu, v, 5);
}
#endif

extern "C" __global__ void votes(const int* x, int* out) {
    const int t = threadIdx.x, n = blockDim.x;
    out[t] = (int)__ballot_sync(ALL_LANES, x[t]);
    out[n + t] = __any_sync(ALL_LANES, x[t]);
    out[2 * n + t] = __all_sync(ALL_LANES, x[t]);
}

// The sum of each block's part, in an order that does not depend on the threads'.
extern "C" __global__ void __launch_bounds__(256) sum(const float* x, float* out, long long n) {
    __shared__ float parts[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    float v = i < n ? x[i] : 0.f;
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(ALL_LANES, v, o);
    if (lane == 0) parts[warp] = v;
    __syncthreads();
    if (warp) return;
    v = lane < (int)(blockDim.x >> 5) ? parts[lane] : 0.f;
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(ALL_LANES, v, o);
    if (lane == 0) out[blockIdx.x] = v;
}

// counts [8]: of i's; wide [1], largest [1], sum [1]; taken [gridDim * blockDim]: a ticket for each thread;
// swapped [1]: the same sum of i's by compare and swap.
extern "C" __global__ void atomics(int* counts, unsigned long long* wide, int* largest, float* sum,
                                   int* ticket, int* taken, int* swapped) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(counts + i % 8, 1);
    atomicAdd(wide, 1ull << 33);
    atomicMax(largest, i ^ 21);
    atomicAdd(sum, 0.25f);
    taken[atomicAdd(ticket, 1)] = i;
    int old = *(volatile int*)swapped, seen;
    do {
        seen = old;
        old = atomicCAS(swapped, seen, seen + i);
    } while (old != seen);
}
