// Half and bfloat16 to float and back, rounded to the nearest even, by integers: the same on every machine.
#pragma once
#include <cstdint>
#include <cstring>

namespace moeflow {
namespace {

inline float as_float(uint32_t bits) { float v; memcpy(&v, &bits, 4); return v; }
inline uint32_t as_bits(float v) { uint32_t bits; memcpy(&bits, &v, 4); return bits; }

inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7FFFu;
    const float small = (float)rest * 0x1p-24f;                       // below 2^-14: the mantissa alone
    const uint32_t normal = (rest << 13) + (rest >= 0x7C00u ? 0x70000000u : 0x38000000u);
    return as_float(sign | (rest < 0x400u ? as_bits(small) : normal));
}
inline uint16_t float_to_half(float v) {
    const uint32_t bits = as_bits(v), sign = bits >> 16 & 0x8000u, u = bits & 0x7FFFFFFFu;
    // Below 2^-14: next to one half a float's last place is the smallest half, so that the addition rounds.
    const uint32_t small = as_bits(as_float(u < 0x38800000u ? u : 0u) + 0.5f) - 0x3F000000u;
    const uint32_t normal = (u + 0xC8000FFFu + (u >> 13 & 1u)) >> 13;
    const uint32_t rest = u < 0x38800000u ? small : u < 0x477FF000u ? normal : u > 0x7F800000u ? 0x7E00u : 0x7C00u;
    return (uint16_t)(sign | rest);
}
inline float bfloat_to_float(uint16_t b) { return as_float((uint32_t)b << 16); }
inline uint16_t float_to_bfloat(float v) {
    const uint32_t u = as_bits(v);
    return (uint16_t)((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : (u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
}

}   // namespace
}   // namespace moeflow
