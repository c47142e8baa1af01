// 4 floats in the vector extension of GCC and Clang: SSE2 on x86-64, NEON on aarch64, scalar code elsewhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd_types.h"

namespace atman::ATMAN_ISA {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kTileVectors = 4;
constexpr int kAccumulators = 24;
#else
constexpr int kTileVectors = 2;
constexpr int kAccumulators = 12;
#endif

ATMAN_INLINE Vec broadcast(float x) { return Vec{x, x, x, x}; }
ATMAN_INLINE Vec zero() { return broadcast(0.0f); }
ATMAN_INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
ATMAN_INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
// Contracted to one instruction where the target has it (-ffp-contract=fast).
ATMAN_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
ATMAN_INLINE Vec add(Vec a, Vec b) { return a + b; }
ATMAN_INLINE Vec sub(Vec a, Vec b) { return a - b; }
ATMAN_INLINE Vec mul(Vec a, Vec b) { return a * b; }
ATMAN_INLINE Vec choose(IntVec condition, Vec yes, Vec no) {
  return reinterpret_cast<Vec>((condition & reinterpret_cast<IntVec>(yes)) |
                               (~condition & reinterpret_cast<IntVec>(no)));
}
ATMAN_INLINE Vec max(Vec a, Vec b) { return choose(a > b, a, b); }
ATMAN_INLINE float sum_lanes(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
ATMAN_INLINE float max_lanes(Vec x) { return maximum(maximum(x[0], x[2]), maximum(x[1], x[3])); }

// x in the lanes [begin, end), `other` elsewhere.
ATMAN_INLINE Vec keep_lanes(Vec x, int64_t begin, int64_t end, Vec other) {
  const IntVec lane = {0, 1, 2, 3};
  const int first = static_cast<int>(minimum<int64_t>(maximum<int64_t>(begin, 0), kLanes));
  const int last = static_cast<int>(minimum<int64_t>(maximum<int64_t>(end, 0), kLanes));
  return choose((lane >= first) & (lane < last), x, other);
}

ATMAN_INLINE Vec round_to_integer(Vec x) {
  const Vec shifter = broadcast(0x1.8p23f);
  return (x + shifter) - shifter;
}

// fraction * 2^whole, or 0 where x is below kExp2Lowest.
ATMAN_INLINE Vec scale_by_power(Vec fraction, Vec whole, Vec x) {
  const IntVec low = x < kExp2Lowest;
  const IntVec exponent = __builtin_convertvector(choose(low | (x != x), zero(), whole), IntVec) << 23;
  const Vec scaled = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(fraction) + exponent);
  return choose(x != x, x, choose(low, zero(), scaled));
}

ATMAN_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
ATMAN_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

ATMAN_INLINE float to_float(float x) { return x; }
ATMAN_INLINE float to_float(BFloat x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
ATMAN_INLINE float to_float(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t rest = (x.bits & 0x7fffu) << 13;
  const bool special = (x.bits & 0x7c00u) == 0x7c00u;
  // Multiplying by 2^112 moves the exponent from half's bias to float's, denormals included.
  const float magnitude = special ? bits_to_float(rest | 0x7f800000u) : bits_to_float(rest) * 0x1p112f;
  return bits_to_float(float_to_bits(magnitude) | sign);
}

ATMAN_INLINE void from_float(float x, float& to) { to = x; }
ATMAN_INLINE void from_float(float x, BFloat& to) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  to.bits = static_cast<uint16_t>(rounded >> 16);
}
ATMAN_INLINE void from_float(float x, Half& to) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Adding 1/2 puts the denormal's bits, rounded to nearest even, at the bottom of the significand.
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | half);
}

template <class T>
ATMAN_INLINE Vec load_first(const T* p, int64_t n) {
  Vec x = zero();
  for (int64_t i = 0; i < minimum<int64_t>(n, kLanes); ++i) x[i] = to_float(p[i]);
  return x;
}
ATMAN_INLINE Vec load_first(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
  Vec x = zero();
  for (int64_t i = 0; i < n; ++i) x[i] = p[i];
  return x;
}

template <class T>
ATMAN_INLINE void store_first(T* p, Vec x, int64_t n) {
  for (int64_t i = 0; i < minimum<int64_t>(n, kLanes); ++i) from_float(x[i], p[i]);
}

// Transposes the 4 x 4 block whose rows are r[0..3].
ATMAN_INLINE void transpose(Vec (&r)[kLanes]) {
  Vec t[kLanes];
  for (int i = 0; i < kLanes; ++i) t[i] = Vec{r[0][i], r[1][i], r[2][i], r[3][i]};
  for (int i = 0; i < kLanes; ++i) r[i] = t[i];
}

}  // namespace atman::ATMAN_ISA
