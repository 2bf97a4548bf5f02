// The kernels for AVX-512 with VNNI.
#include "vectors_512.hpp"

#include "rows.hpp"

namespace moeflow {
Multiply vnni_kernel(const Matrix& matrix, int planes) { return kernel_of(matrix, planes); }
}   // namespace moeflow
