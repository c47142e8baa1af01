// The score tile: which vectors of a key tile a strip of rows needs, and the product that fills them.
#pragma once

#include "pack.h"

namespace atman::ATMAN_ISA {

// Rows computed together against one panel.
constexpr int64_t kStrip = kAccumulators / kTileVectors;
constexpr int64_t kTileRow = kKeyTile;

// A block of query rows of one head against one tile of keys. Vector ranges are relative to the tile.
struct Tile {
  const Visibility& visible;
  int64_t first_row;
  int64_t rows;
  int64_t first_key;

  // Vectors in which at least one of the rows [first, last] of the block sees a key.
  Range vectors(int64_t first, int64_t last) const {
    const Range keys = visible.keys(first_row + first, first_row + last);
    const int64_t begin = maximum<int64_t>(keys.begin - first_key, 0);
    const int64_t end = minimum<int64_t>(keys.end - first_key, kKeyTile);
    return begin < end ? Range{begin / kLanes, (end + kLanes - 1) / kLanes} : Range{0, 0};
  }
  Range vectors() const { return vectors(0, rows - 1); }
  Range strip_vectors(int64_t row) const { return vectors(row, minimum<int64_t>(row + kStrip, rows) - 1); }

  // Keys of the tile that `row` sees, relative to the tile, possibly empty or outside it.
  Range row_keys(int64_t row) const {
    const Range keys = visible.keys(first_row + row, first_row + row);
    return {keys.begin - first_key, keys.end - first_key};
  }

  // Rows of the block that see one of the keys [first, last] of the tile.
  Range key_rows(int64_t first, int64_t last) const {
    const Range all = visible.rows(first_key + first, first_key + last);
    return {maximum<int64_t>(all.begin - first_row, 0), minimum<int64_t>(all.end - first_row, rows)};
  }

  // The distance of a row back to the first key of the tile.
  float distance(int64_t row) const { return static_cast<float>(first_row + row + visible.shift - first_key); }

  bool has_edge() const { return !visible.all(first_row, first_row + rows - 1, {first_key, first_key + kKeyTile}); }
};

// The numbers 0, 1, ... of the lanes.
inline Vec lane_numbers() {
  alignas(64) float numbers[kLanes];
  for (int i = 0; i < kLanes; ++i) numbers[i] = static_cast<float>(i);
  return load(numbers);
}

// finish(Int<MR>, Int<NV>, row, vector, acc) for every strip of rows and panel of the tile: acc = left panel.
template <class W, class Finish>
ATMAN_INLINE void multiply_panel(const Tile& tile, int64_t panel, const W* left, int64_t left_row, const W* panel_data,
                                 int64_t head_dim, Finish finish) {
  for (int64_t row = 0; row < tile.rows; row += kStrip) {
    const Range needed = tile.strip_vectors(row);
    const int64_t first = panel * kTileVectors;
    if (needed.begin >= first + kTileVectors || needed.end <= first) continue;
    with_vectors(minimum<int64_t>(needed.end - first, kTileVectors), [&](auto nv) {
      constexpr int NV = decltype(nv)::value;
      const auto run = [&](auto mr) {
        constexpr int MR = decltype(mr)::value;
        Vec acc[MR][NV];
#pragma GCC unroll 12
        for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) acc[i][j] = zero();
        }
        multiply<MR, NV, W>(words<W>(head_dim), {left + row * left_row, left_row, 1}, panel_data, kPanel, acc);
        finish(mr, nv, row, first, acc);
      };
      const int64_t height = tile.rows - row;
      if (height > 4) return run(Int<kStrip>{});
      if (height > 2) return run(Int<4>{});
      if (height > 1) return run(Int<2>{});
      return run(Int<1>{});
    });
  }
}

// In the rows of one strip, replaces what a row does not see by `hidden`.
inline void hide_edges(const Tile& tile, int64_t row, Range vectors, float hidden, float* scores) {
  const int64_t last = minimum<int64_t>(row + kStrip, tile.rows);
  for (; row < last; ++row) {
    const Range keys = tile.row_keys(row);
    for (int64_t j = vectors.begin; j < vectors.end; ++j) {
      const int64_t key = j * kLanes;
      if (key >= keys.begin && key + kLanes <= keys.end) continue;
      float* at = scores + row * kTileRow + key;
      store(at, keep_lanes(load(at), keys.begin - key, keys.end - key, broadcast(hidden)));
    }
  }
}

// Zeroes the vectors of `all` outside `computed`, so that products may run over `all`.
inline void clear_outside(Range all, Range computed, int64_t row, int64_t rows, float* scores) {
  for (const int64_t last = row + rows; row < last; ++row) {
    for (int64_t j = all.begin; j < all.end; ++j) {
      if (j < computed.begin || j >= computed.end) store(scores + row * kTileRow + j * kLanes, zero());
    }
  }
}

// The tile as the left operand of a product over its keys; `scratch` takes the words that are not the tile's floats.
template <class W>
LeftOperand<W> over_keys(const float* scores, int64_t rows, Range vectors, W* scratch) {
  if constexpr (Word<W>::kNumbers == 1) {
    return {scores, kTileRow, 1};
  } else {
    constexpr int64_t kRowWords = kTileRow / Word<W>::kNumbers;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = vectors.begin; j < vectors.end; ++j)
        Word<W>::store_neighbours(scratch + row * kRowWords + j * kLanes / Word<W>::kNumbers,
                                  load(scores + row * kTileRow + j * kLanes));
    }
    return {scratch, kRowWords, 1};
  }
}

// The same of a product over its rows.
template <class W>
LeftOperand<W> over_rows(const float* scores, int64_t rows, Range vectors, W* scratch) {
  if constexpr (Word<W>::kNumbers == 1) {
    return {scores, 1, kTileRow};
  } else {
    for (int64_t row = 0; row < rows; row += Word<W>::kNumbers) {
      for (int64_t j = vectors.begin; j < vectors.end; ++j) {
        const float* upper = scores + row * kTileRow + j * kLanes;
        store(scratch + row / Word<W>::kNumbers * kTileRow + j * kLanes,
              Word<W>::interleave(load(upper), row + 1 < rows ? load(upper + kTileRow) : zero()));
      }
    }
    return {scratch, 1, kTileRow};
  }
}

// Words of the packed scores of `rows` rows: none where the scores are used as they are.
template <class W>
ATMAN_INLINE int64_t scratch_words(int64_t rows) {
  return Word<W>::kNumbers == 1 ? 0 : words<W>(rows) * kTileRow;
}

}  // namespace atman::ATMAN_ISA
