// The kernels for AVX2 with FMA and F16C.
#include "vectors_256.hpp"

#include "rows.hpp"

namespace moeflow {
Multiply avx2_kernel(const Matrix& matrix, int planes) { return kernel_of(matrix, planes); }
}   // namespace moeflow
