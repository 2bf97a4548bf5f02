// Kernels that are wrong, each in one way, for tests of what the emulator says about it.
#include "primitives.cuh"

// Reads what its neighbour writes. BARRIER: whether it waits for that, as it must.
extern "C" __global__ void neighbour(int* out) {
    __shared__ int shared[256];
    shared[threadIdx.x] = threadIdx.x;
#ifdef BARRIER
    __syncthreads();
#endif
    out[threadIdx.x] = threadIdx.x ? shared[threadIdx.x - 1] : -1;
}

// A sum over blocks that is not atomic between reading and writing: right only if no other thread comes between.
extern "C" __global__ void lost(int* sum, int* other) {
    const int old = *sum;
    atomicAdd(other, 1);
    *sum = old + 1;
}

extern "C" __global__ void arrivals(int* ticket, int* taken) {
    taken[atomicAdd(ticket, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

extern "C" __global__ void leftover(int* out) {
    __shared__ int shared[64];
    out[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x];
    shared[threadIdx.x] = 1;
}

extern "C" __global__ void absent(int* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0xFFFFu, (int)threadIdx.x, 8);
}

// Not wrong: who has ended is not waited for.
extern "C" __global__ void early(int* out) {
    if (threadIdx.x < 8 || threadIdx.x >= 40) return;
    const int sum = __shfl_xor_sync(0xFFFFFFFFu, (int)threadIdx.x, 1) + __popc(__ballot_sync(0xFFFFFFFFu, 1));
    __syncthreads();
    out[threadIdx.x] = sum;
}

extern "C" __global__ void half_a_barrier() {
    if (threadIdx.x < 40)
        __syncthreads();
    else
        __syncwarp();
}

extern "C" __global__ void half_a_warp(int* out) {
    if (threadIdx.x < 8) return;
    if (threadIdx.x < 16)
        __syncwarp();
    else
        out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1, 16);
}

extern "C" __global__ void two_barriers() {
    if (threadIdx.x & 1)
        __syncthreads();
    else
        __syncthreads();
}

extern "C" __global__ void left_out() { __syncwarp(2u); }
extern "C" __global__ void waits(const int* flag) { while (!load_volatile(flag)) {} }
extern "C" __global__ void null(int* p) { *p = 1; }
extern "C" __global__ void wild(long long address) { *(char*)address = 1; }
extern "C" __global__ void misaligned(const char* p, uint4* out) { *out = *(const uint4*)(p + 8); }
extern "C" __global__ void outside(const int* index, int* out) {
    __shared__ int shared[4];
    shared[*index] = 1;
    *out = shared[0];
}
extern "C" __global__ void shifted(const int* by, int* out) { *out = 1 << *by; }
extern "C" __global__ void divided(const int* by, int* out) { *out = 1 / *by; }

extern "C" __global__ void parameters(const float* x, long long n, float scale) {}
#ifdef WRONG_PARAMETER
extern "C" __global__ void short_parameter(int n) {}
#endif
__global__ void mangled() {}
