// Element types and what the vector headers share. ATMAN_ISA is the namespace of the instruction set being compiled.
//
// Files that include this are compiled with instruction-set flags. They must not instantiate functions of the standard
// library: the linker could choose such a copy for the whole program, and it would fault on an older processor.
#pragma once

#include <cstdint>

#define ATMAN_INLINE [[gnu::always_inline]] inline

namespace atman::ATMAN_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <class W>
struct Word;

// The words in which tensors of T are packed for the products.
template <class T>
struct PackedAs {
  using type = float;
};
template <class T>
using Packed = typename PackedAs<T>::type;

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLowest = -0x1.fffffep127f;

// ln(2) in two parts; the first has 9 bits, so that its product with a power of two is exact without fma as well.
constexpr float kLn2High = 0x1.63p-1f;
constexpr float kLn2Low = -0x1.bd0106p-13f;

// 2^x counts as 0 below this; one more and it would be denormal.
constexpr float kExp2Lowest = -126.0f;

// Minimax fit of e^r on [-ln(2) / 2, ln(2) / 2], relative error 2e-8, highest power first.
constexpr float kExpCoefficients[7] = {
    0x1.6ab97ep-10f, 0x1.126d0cp-7f, 0x1.55589ap-5f, 0x1.55540ap-3f, 0x1.fffffap-2f, 1.0f, 1.0f};

template <class T>
ATMAN_INLINE T minimum(T a, T b) {
  return a < b ? a : b;
}
template <class T>
ATMAN_INLINE T maximum(T a, T b) {
  return a < b ? b : a;
}
ATMAN_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
ATMAN_INLINE int64_t round_down(int64_t n, int64_t multiple) { return n / multiple * multiple; }

}  // namespace atman::ATMAN_ISA
