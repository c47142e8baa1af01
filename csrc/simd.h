// The vector type of the instruction set being compiled, and what is written once on top of it.
#pragma once

#if defined(ATMAN_SIMD_AVX512_BF16)
#include "simd_avx512_bf16.h"
#elif defined(ATMAN_SIMD_AVX512)
#include "simd_avx512.h"
#elif defined(ATMAN_SIMD_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace atman::ATMAN_ISA {

// How products see an operand: 32-bit words, each of one or several numbers that follow each other along the depth.
template <>
struct Word<float> {
  static constexpr int kNumbers = 1;

  ATMAN_INLINE static Vec multiply_add(Vec left, Vec right, Vec sum) { return fma(left, right, sum); }
  template <class T>
  ATMAN_INLINE static Vec load_first(const T* p, int64_t n) {
    return ATMAN_ISA::load_first(p, n);
  }
};

// e^x with a relative error below 2e-7; 0 below 2^-126, so that no denormals arise; NaN stays NaN.
//
// Scores stay in natural units up to here: log2(e) times a finite bias may be infinite, and may round two biases to one.
ATMAN_INLINE Vec exp(Vec x) {
  const Vec power = mul(x, broadcast(kLog2E));
  const Vec whole = round_to_integer(power);
  const Vec r = fma(whole, broadcast(-kLn2Low), fma(whole, broadcast(-kLn2High), x));
  Vec fraction = broadcast(kExpCoefficients[0]);
#pragma GCC unroll 6
  for (int i = 1; i < 7; ++i) fraction = fma(fraction, r, broadcast(kExpCoefficients[i]));
  return scale_by_power(fraction, whole, power);
}

}  // namespace atman::ATMAN_ISA
