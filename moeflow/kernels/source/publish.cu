// Values from the device to page-locked host memory, written by a kernel: a copy engine that is bringing a layer's blobs
// would let a copy of eight kilobytes wait for milliseconds.

// values, host: [count]. One block.
extern "C" __global__ void publish(const long long* values, long long count, long long* host) {
    for (long long i = threadIdx.x; i < count; i += blockDim.x) host[i] = values[i];
}
