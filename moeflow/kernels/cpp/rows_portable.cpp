// The kernels for any machine.
#include "vectors_portable.hpp"

#include "rows.hpp"

namespace moeflow {
Multiply portable_kernel(const Matrix& matrix, int planes) { return kernel_of(matrix, planes); }
}   // namespace moeflow
