// Every primitive on arrays of raw bits, for a comparison with numpy's arithmetic.
#include "primitives.cuh"

#define EACH const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; if (i >= n) return

extern "C" __global__ void dots(const unsigned* a, const unsigned* b, const unsigned* c, int* out, long long n) {
    EACH;
    out[2 * i] = dp4a_us(a[i], (int)b[i], (int)c[i]);
    out[2 * i + 1] = dp4a_ss((int)a[i], (int)b[i], (int)c[i]);
}

extern "C" __global__ void narrow(const float* x, unsigned short* half, unsigned short* bf16, long long n) {
    EACH;
    half[i] = float_to_half(x[i]);
    bf16[i] = float_to_bf16(x[i]);
}

extern "C" __global__ void widen(const unsigned short* bits, float* half, float* bf16, long long n) {
    EACH;
    half[i] = half_to_float(bits[i]);
    bf16[i] = bf16_to_float(bits[i]);
}

extern "C" __global__ void pairs(const unsigned* a, const unsigned* b, const unsigned* c, unsigned* out, long long n) {
    EACH;
    out[i] = h2_fma(a[i], b[i], c[i]);
    out[n + i] = h2_add(a[i], b[i]);
    out[2 * n + i] = h2_mul(a[i], b[i]);
    const float2 two = h2_to_float2(a[i]);
    out[3 * n + i] = float2_to_h2(two.y, two.x);
}

extern "C" __global__ void loads(const uint4* from, uint4* stream, uint4* host, const int* flag, int* flags,
                                 long long n) {
    EACH;
    stream[i] = load_stream(from + i);
    host[i] = load_host(from + i);
    store_volatile(flags + i, load_volatile(flag));
}

extern "C" __global__ void bits(const unsigned* x, int* out, long long n) {
    EACH;
    const unsigned v = x[i];
    out[i] = __popc(v);
    out[n + i] = __ffs((int)v);
    out[2 * n + i] = __clz((int)v);
    out[3 * n + i] = (int)__brev(v);
    out[4 * n + i] = (int)__byte_perm(v, ~v, 0x7350u);
    out[5 * n + i] = max(min((int)v, 1000), -1000);
    out[6 * n + i] = __float2int_rn(__uint_as_float(v));
}

extern "C" __global__ void floats(const float* a, const float* b, const float* c, float* out, long long n) {
    EACH;
    out[i] = add_rn(mul_rn(a[i], b[i]), c[i]);
    out[n + i] = fmaf(a[i], b[i], c[i]);
    out[2 * n + i] = fmaxf(a[i], b[i]);
    out[3 * n + i] = fminf(a[i], b[i]);
    out[4 * n + i] = rintf(a[i]);
}
