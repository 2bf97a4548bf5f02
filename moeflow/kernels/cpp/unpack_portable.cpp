// Packed rows to plain numbers on any machine.
#include "numbers.hpp"
#include "shape.hpp"

namespace moeflow {
namespace {

struct Eight { float at[8]; };

template <class F> inline Eight eight(F f) {
    Eight out;
    for (int i = 0; i < 8; i++) out.at[i] = f(i);
    return out;
}
inline Eight signed_bytes(const uint8_t* p) {
    return eight([=](int i) { return (float)(int8_t)p[i]; });
}
inline Eight unsigned_bytes(const uint8_t* p) {
    return eight([=](int i) { return (float)p[i]; });
}
template <int BITS> inline Eight fields(uint32_t word) {
    return eight([=](int i) { return (float)(word >> (BITS * i) & ((1u << BITS) - 1u)); });
}
// Two bits from `low`, and above them one of `high`: bits 0 to 3, and 8 to 11 (kernels/packing.py).
inline Eight fields_3(uint32_t low, uint32_t high) {
    return eight([=](int i) { return (float)((low >> (2 * i) & 3u) | (high >> (i + i / 4 * 4) & 1u) << 2); });
}
inline Eight looked_up(uint32_t word, const float* table) {
    return eight([=](int i) { return table[word >> (4 * i) & 15u]; });
}
inline Eight minus(const Eight& v, float zero) {
    return eight([&](int i) { return v.at[i] - zero; });
}
inline Eight times(const Eight& v, float scale) {
    return eight([&](int i) { return v.at[i] * scale; });
}
template <Number DTYPE> inline void store(uint8_t* out, int64_t piece, const Eight& v) {
    if (DTYPE == FLOAT) memcpy(out + 32 * piece, v.at, 32);
    else {
        uint16_t bits[8];
        for (int i = 0; i < 8; i++) bits[i] = DTYPE == HALF ? float_to_half(v.at[i]) : float_to_bfloat(v.at[i]);
        memcpy(out + 16 * piece, bits, 16);
    }
}

}   // namespace
}   // namespace moeflow

#include "unpack_rows.hpp"

namespace moeflow {
void unpack_portable(const Matrix& m, const uint8_t* blob, Number dtype, void* out, int64_t begin, int64_t end) {
    unpack_any(m, blob, dtype, out, begin, end);
}
}   // namespace moeflow
