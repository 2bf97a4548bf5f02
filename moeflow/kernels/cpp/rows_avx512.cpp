// The kernels for AVX-512 without VNNI.
#include "vectors_512.hpp"

#include "rows.hpp"

namespace moeflow {
Multiply avx512_kernel(const Matrix& matrix, int planes) { return kernel_of(matrix, planes); }
}   // namespace moeflow
