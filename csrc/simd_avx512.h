// 16 floats in an AVX-512 register.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd_types.h"

namespace atman::ATMAN_ISA {

using Vec = __m512;
constexpr int kLanes = 16;
// 32 registers: accumulators of a 6 x 4 (8 x 3, 12 x 2) tile, a row of operands and a broadcast.
constexpr int kTileVectors = 4;
constexpr int kAccumulators = 24;

ATMAN_INLINE Vec zero() { return _mm512_setzero_ps(); }
ATMAN_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
ATMAN_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
ATMAN_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
ATMAN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
ATMAN_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
ATMAN_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
ATMAN_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
ATMAN_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
ATMAN_INLINE float sum_lanes(Vec x) { return _mm512_reduce_add_ps(x); }
ATMAN_INLINE float max_lanes(Vec x) { return _mm512_reduce_max_ps(x); }

ATMAN_INLINE __mmask16 first_lanes(int64_t n) {
  return n <= 0 ? 0 : n >= kLanes ? 0xffff : static_cast<__mmask16>((1u << n) - 1u);
}

// x in the lanes [begin, end), `other` elsewhere.
ATMAN_INLINE Vec keep_lanes(Vec x, int64_t begin, int64_t end, Vec other) {
  return _mm512_mask_mov_ps(other, first_lanes(end) & ~first_lanes(begin), x);
}

ATMAN_INLINE Vec round_to_integer(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// fraction * 2^whole, or 0 where x is below kExp2Lowest.
ATMAN_INLINE Vec scale_by_power(Vec fraction, Vec whole, Vec x) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast(kExp2Lowest), _CMP_NLT_UQ), fraction, whole);
}

ATMAN_INLINE Vec load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
ATMAN_INLINE Vec load_first(const Half* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
ATMAN_INLINE Vec load_first(const BFloat* p, int64_t n) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

ATMAN_INLINE void store_first(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
ATMAN_INLINE void store_first(Half* p, Vec x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
ATMAN_INLINE void store_first(BFloat* p, Vec x, int64_t n) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i top = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtepi32_epi16(top));
}

// Transposes the 16 x 16 block whose rows are r[0..15].
ATMAN_INLINE void transpose(Vec (&r)[kLanes]) {
  Vec t[kLanes];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  // r[4 g + c] now holds, in its four 128-bit parts, columns c, c + 4, c + 8, c + 12 of the rows 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const Vec even_low = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
    const Vec odd_low = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const Vec even_high = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const Vec odd_high = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    t[c + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    t[c + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    t[c + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
  for (int i = 0; i < kLanes; ++i) r[i] = t[i];
}

}  // namespace atman::ATMAN_ISA
