// Register-blocked products: a tile of MR rows x NV vectors of C stays in registers while the depth runs.
#pragma once

#include "simd.h"
#include "visibility.h"

namespace atman::ATMAN_ISA {

template <int N>
struct Int {
  static constexpr int value = N;
  constexpr operator int() const { return N; }
};

// Element (i, k) of the left operand is data[i * row + k * step], so a transposed operand costs nothing. Depths and
// steps count words.
template <class W>
struct LeftOperand {
  const W* data;
  int64_t row;
  int64_t step;
};

// acc[i][j] += sum_k a(i, k) b[k * b_step + lanes of j]
template <int MR, int NV, class W>
ATMAN_INLINE void multiply(int64_t depth, LeftOperand<W> a, const W* b, int64_t b_step, Vec (&acc)[MR][NV]) {
  // A copy that nothing else sees: the compiler stores `acc` in every step where a later loop indexes it.
  Vec sum[MR][NV];
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sum[i][j] = acc[i][j];
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      const Vec left = broadcast(a.data[i * a.row]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[i][j] = Word<W>::multiply_add(left, right[j], sum[i][j]);
    }
    a.data += a.step;
    b += b_step;
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = sum[i][j];
  }
}

// Rows that a tile may read or write beyond the last row of its operands.
constexpr int kRowPadding = 12;

template <int NV>
constexpr int tallest() {
  return kAccumulators / NV < kRowPadding ? kAccumulators / NV : kRowPadding;
}

// Calls f(Int<MR>) with the lowest tile height that covers `rows`; operands are padded, so extra rows are harmless.
template <int NV, class F>
ATMAN_INLINE void with_height(int64_t rows, F&& f) {
  constexpr int high = tallest<NV>();
  if (rows > 8 && high >= 12) return f(Int<(high < 12 ? high : 12)>{});
  if (rows > 6 && high >= 8) return f(Int<(high < 8 ? high : 8)>{});
  if (rows > 4 && high >= 6) return f(Int<(high < 6 ? high : 6)>{});
  if (rows > 2) return f(Int<(high < 4 ? high : 4)>{});
  if (rows > 1) return f(Int<2>{});
  return f(Int<1>{});
}

// Calls f(Int<NV>) for 1 <= vectors <= kTileVectors.
template <class F>
ATMAN_INLINE void with_vectors(int64_t vectors, F&& f) {
  if constexpr (kTileVectors >= 4) {
    if (vectors == 4) return f(Int<4>{});
    if (vectors == 3) return f(Int<3>{});
  }
  if (vectors == 2) return f(Int<2>{});
  return f(Int<1>{});
}

// C = factor[row] * C + A B over `rows` x `vectors`; depth(first, last) is the range of k in which the rows have
// entries.
template <class W, class Depth>
void accumulate(LeftOperand<W> a, const W* b, int64_t b_step, float* c, int64_t c_row, Range rows, int64_t vectors,
                const float* factor, Depth depth) {
  const int64_t pieces = (vectors + kTileVectors - 1) / kTileVectors;
  for (int64_t piece = 0, column = 0; piece < pieces; ++piece) {
    const int64_t width = (vectors - column + pieces - piece - 1) / (pieces - piece);
    with_vectors(width, [&](auto nv) {
      constexpr int NV = decltype(nv)::value;
      for (int64_t row = rows.begin; row < rows.end; row += tallest<NV>()) {
        const int64_t height = minimum<int64_t>(rows.end - row, tallest<NV>());
        const Range k = depth(row, row + height - 1);
        if (k.empty() && factor == nullptr) continue;
        with_height<NV>(height, [&](auto mr) {
          constexpr int MR = decltype(mr)::value;
          float* out = c + row * c_row + column * kLanes;
          Vec acc[MR][NV];
#pragma GCC unroll 12
          for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) acc[i][j] = load(out + i * c_row + j * kLanes);
          }
          if (factor != nullptr) {
#pragma GCC unroll 12
            for (int i = 0; i < MR; ++i) {
              const Vec scale = broadcast(factor[row + i]);
#pragma GCC unroll 4
              for (int j = 0; j < NV; ++j) acc[i][j] = mul(acc[i][j], scale);
            }
          }
          const LeftOperand<W> left{a.data + row * a.row + k.begin * a.step, a.row, a.step};
          multiply<MR, NV>(k.end - k.begin, left, b + k.begin * b_step + column * kLanes, b_step, acc);
#pragma GCC unroll 12
          for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) store(out + i * c_row + j * kLanes, acc[i][j]);
          }
        });
      }
    });
    column += width;
  }
}

}  // namespace atman::ATMAN_ISA
