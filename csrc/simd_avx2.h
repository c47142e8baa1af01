// 8 floats in an AVX register, with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd_types.h"

namespace atman::ATMAN_ISA {

using Vec = __m256;
constexpr int kLanes = 8;
// 16 registers: accumulators of a 6 x 2 (12 x 1) tile, a row of operands and a broadcast.
constexpr int kTileVectors = 2;
constexpr int kAccumulators = 12;

ATMAN_INLINE Vec zero() { return _mm256_setzero_ps(); }
ATMAN_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
ATMAN_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
ATMAN_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
ATMAN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
ATMAN_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
ATMAN_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
ATMAN_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
ATMAN_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
ATMAN_INLINE float sum_lanes(Vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
ATMAN_INLINE float max_lanes(Vec x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

ATMAN_INLINE __m256i lanes_below(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int bound = static_cast<int>(minimum<int64_t>(maximum<int64_t>(n, 0), kLanes));
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(bound), lane);
}

// x in the lanes [begin, end), `other` elsewhere.
ATMAN_INLINE Vec keep_lanes(Vec x, int64_t begin, int64_t end, Vec other) {
  const __m256i kept = _mm256_andnot_si256(lanes_below(begin), lanes_below(end));
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(kept));
}

ATMAN_INLINE Vec round_to_integer(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// fraction * 2^whole, or 0 where x is below kExp2Lowest.
ATMAN_INLINE Vec scale_by_power(Vec fraction, Vec whole, Vec x) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
  const Vec scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(fraction), exponent));
  const Vec nan_kept = _mm256_blendv_ps(scaled, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_and_ps(_mm256_cmp_ps(x, broadcast(kExp2Lowest), _CMP_NLT_UQ), nan_kept);
}

ATMAN_INLINE Vec load_first(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : _mm256_maskload_ps(p, lanes_below(n));
}

template <class T>
ATMAN_INLINE __m128i load_first_16bit(const T* p, int64_t n) {
  if (n >= kLanes) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  alignas(16) uint16_t piece[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) piece[i] = p[i].bits;
  return _mm_load_si128(reinterpret_cast<const __m128i*>(piece));
}

template <class T>
ATMAN_INLINE void store_first_16bit(T* p, __m128i x, int64_t n) {
  if (n >= kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
    return;
  }
  alignas(16) uint16_t piece[kLanes];
  _mm_store_si128(reinterpret_cast<__m128i*>(piece), x);
  for (int64_t i = 0; i < n; ++i) p[i].bits = piece[i];
}

ATMAN_INLINE Vec load_first(const Half* p, int64_t n) { return _mm256_cvtph_ps(load_first_16bit(p, n)); }
ATMAN_INLINE Vec load_first(const BFloat* p, int64_t n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_first_16bit(p, n)), 16));
}

ATMAN_INLINE void store_first(float* p, Vec x, int64_t n) {
  if (n >= kLanes)
    store(p, x);
  else
    _mm256_maskstore_ps(p, lanes_below(n), x);
}
ATMAN_INLINE void store_first(Half* p, Vec x, int64_t n) {
  store_first_16bit(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}
ATMAN_INLINE void store_first(BFloat* p, Vec x, int64_t n) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  store_first_16bit(p, _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1)), n);
}

// Transposes the 8 x 8 block whose rows are r[0..7].
ATMAN_INLINE void transpose(Vec (&r)[kLanes]) {
  Vec t[kLanes];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x20);
    t[c + 4] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x31);
  }
  for (int i = 0; i < kLanes; ++i) r[i] = t[i];
}

}  // namespace atman::ATMAN_ISA
