// What Python calls: plain functions of plain pointers.
#include "matrix.hpp"

using namespace moeflow;

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int32_t moeflow_best_level() { return best_level(); }

EXPORTED void moeflow_sizes(const Matrix* matrix, int32_t planes, Sizes* sizes) { *sizes = sizes_of(*matrix, planes); }

EXPORTED void moeflow_prepare(const Matrix* matrix, int32_t dtype, const void* x, int64_t x_stride, const Vectors* vectors) {
    prepare(*matrix, (Number)dtype, x, x_stride, *vectors);
}

// Whether there is a kernel for it.
EXPORTED int32_t moeflow_can_multiply(const Matrix* matrix, int32_t planes, int32_t level) {
    return multiply_for(*matrix, planes, (Level)level) != nullptr;
}

// 0, or 1 where there is no kernel.
EXPORTED int32_t moeflow_multiply(const Job* job, int32_t level) {
    const Multiply kernel = multiply_for(*job->matrix, job->vectors->planes, (Level)level);
    if (!kernel) return 1;
    kernel(*job);
    return 0;
}

// Of this interface: library.py has the same number.
EXPORTED int32_t moeflow_version() { return 2; }

// 0, or 1 where there is no such level.
EXPORTED int32_t moeflow_unpack(const Matrix* matrix, const uint8_t* blob, int32_t dtype, void* out, int64_t begin, int64_t end,
                                int32_t level) {
    const Unpack unpack = unpack_for((Level)level);
    if (!unpack) return 1;
    unpack(*matrix, blob, (Number)dtype, out, begin, end);
    return 0;
}
