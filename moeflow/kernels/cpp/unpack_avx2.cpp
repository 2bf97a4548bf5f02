// Packed rows to plain numbers with AVX2 and F16C.
#include <immintrin.h>

#include "matrix.hpp"

namespace moeflow {
namespace {

using Eight = __m256;

inline __m128i eight_bytes(const uint8_t* p) { return _mm_loadl_epi64((const __m128i*)p); }
inline Eight signed_bytes(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(p))); }
inline Eight unsigned_bytes(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight_bytes(p))); }

template <int BITS> inline __m256i codes_of(uint32_t word) {
    const __m256i places = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(BITS));
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)word), places), _mm256_set1_epi32((1 << BITS) - 1));
}
template <int BITS> inline Eight fields(uint32_t word) { return _mm256_cvtepi32_ps(codes_of<BITS>(word)); }
// Two bits from `low`, and above them one of `high`: bits 0 to 3, and 8 to 11 (kernels/packing.py).
inline Eight fields_3(uint32_t low, uint32_t high) {
    const __m256i third = _mm256_srlv_epi32(_mm256_set1_epi32((int)high), _mm256_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11));
    const __m256i above = _mm256_slli_epi32(_mm256_and_si256(third, _mm256_set1_epi32(1)), 2);
    return _mm256_cvtepi32_ps(_mm256_or_si256(codes_of<2>(low), above));
}
inline Eight looked_up(uint32_t word, const float* table) {
    const __m256i codes = codes_of<4>(word);   // a permutation takes three bits, the blend the fourth
    const Eight low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), codes);
    const Eight high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), codes);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}
inline Eight minus(Eight v, float zero) { return _mm256_sub_ps(v, _mm256_set1_ps(zero)); }
inline Eight times(Eight v, float scale) { return _mm256_mul_ps(v, _mm256_set1_ps(scale)); }

inline __m128i to_bfloats(Eight v) {
    const __m256i bits = _mm256_castps_si256(v), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i all = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), none);
    return _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
template <Number DTYPE> inline void store(uint8_t* out, int64_t piece, Eight v) {
    if (DTYPE == FLOAT) _mm256_storeu_ps((float*)out + 8 * piece, v);
    else _mm_storeu_si128((__m128i*)out + piece, DTYPE == HALF ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : to_bfloats(v));
}

}   // namespace
}   // namespace moeflow

#include "unpack_rows.hpp"

namespace moeflow {
void unpack_avx2(const Matrix& m, const uint8_t* blob, Number dtype, void* out, int64_t begin, int64_t end) {
    unpack_any(m, blob, dtype, out, begin, end);
}
}   // namespace moeflow
