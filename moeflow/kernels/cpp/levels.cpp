// Which kernels this machine can run.
#include "matrix.hpp"

namespace moeflow {

Multiply portable_kernel(const Matrix&, int planes);
void unpack_portable(const Matrix&, const uint8_t*, Number, void*, int64_t, int64_t);

#if defined(__x86_64__)
Multiply avx2_kernel(const Matrix&, int planes);
Multiply avx512_kernel(const Matrix&, int planes);
Multiply vnni_kernel(const Matrix&, int planes);
void unpack_avx2(const Matrix&, const uint8_t*, Number, void*, int64_t, int64_t);

// __builtin_cpu_supports asks the operating system too: whether it keeps the wide registers.
Level best_level() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return PORTABLE;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!wide) return AVX2;
    return __builtin_cpu_supports("avx512vnni") ? VNNI : AVX512;
}

Multiply multiply_for(const Matrix& matrix, int32_t planes, Level level) {
    if (level > best_level()) return nullptr;
    switch (level) {
        case PORTABLE: return portable_kernel(matrix, planes);
        case AVX2: return avx2_kernel(matrix, planes);
        case AVX512: return avx512_kernel(matrix, planes);
        case VNNI: return vnni_kernel(matrix, planes);
        default: return nullptr;
    }
}

Unpack unpack_for(Level level) { return level > best_level() ? nullptr : level >= AVX2 ? unpack_avx2 : unpack_portable; }
#else
Level best_level() { return PORTABLE; }

Multiply multiply_for(const Matrix& matrix, int32_t planes, Level level) {
    return level == PORTABLE ? portable_kernel(matrix, planes) : nullptr;
}

Unpack unpack_for(Level level) { return level == PORTABLE ? unpack_portable : nullptr; }
#endif

}   // namespace moeflow
