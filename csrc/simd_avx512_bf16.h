// Pairs of bf16 in the words of an AVX-512 register: a product step multiplies both and adds them to one float.
#pragma once

#include "simd_avx512.h"

namespace atman::ATMAN_ISA {

struct Pair {
  uint32_t bits;
};

template <>
struct PackedAs<BFloat> {
  using type = Pair;
};

// The words travel as the bits of a Vec.
ATMAN_INLINE Vec load(const Pair* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
ATMAN_INLINE void store(Pair* p, Vec x) { _mm512_storeu_si512(p, _mm512_castps_si512(x)); }
ATMAN_INLINE Vec broadcast(Pair x) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(x.bits))); }

template <>
struct Word<Pair> {
  static constexpr int kNumbers = 2;

  ATMAN_INLINE static Vec multiply_add(Vec left, Vec right, Vec sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right));
  }

  // The words of the first n numbers of a row; zeros follow.
  ATMAN_INLINE static Vec load_first(const BFloat* p, int64_t n) {
    const __mmask32 lanes = n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes, p));
  }

  // Words of (upper[i], lower[i]) of the first numbers of two rows.
  ATMAN_INLINE static Vec interleave_first(const BFloat* upper, int64_t n_upper, const BFloat* lower, int64_t n_lower) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n_upper), upper));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n_lower), lower));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  // Words of (upper[i], lower[i]), rounded to nearest even.
  ATMAN_INLINE static Vec interleave(Vec upper, Vec lower) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(upper)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(lower)));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  // Stores the words of neighbouring lanes of x, rounded to nearest even.
  ATMAN_INLINE static void store_neighbours(Pair* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
};

}  // namespace atman::ATMAN_ISA
