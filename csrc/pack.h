// Copies of strided rows into contiguous fp32 tiles, and back. Packing costs O(rows * head_dim) and saves the products,
// which are O(rows * keys * head_dim), page and cache-set conflicts, conversions and tails.
#pragma once

#include "microkernel.h"

namespace atman::ATMAN_ISA {

// Keys in one panel: panel element (key, d) is panel[d * kPanel + key], so that a vector holds neighbouring keys.
constexpr int64_t kPanel = kTileVectors * kLanes;
static_assert(kKeyTile % kPanel == 0);

inline int64_t padded_head_dim(int64_t head_dim) { return round_up(head_dim, kLanes); }

// Words that hold `count` numbers of one row.
template <class W>
ATMAN_INLINE int64_t words(int64_t count) {
  return (count + Word<W>::kNumbers - 1) / Word<W>::kNumbers;
}
template <class W>
ATMAN_INLINE Range words(Range numbers) {
  return numbers.empty() ? Range{0, 0} : Range{numbers.begin / Word<W>::kNumbers, words<W>(numbers.end)};
}
template <class W>
ATMAN_INLINE int64_t padded_words(int64_t head_dim) {
  return round_up(words<W>(head_dim), kLanes);
}

// The keys (or values) of one sequence and head: first the prefix, then the sequence's own.
template <class T>
struct KeyRows {
  const T* prefix;
  const T* own;
  int64_t prefix_stride, own_stride, prefix_length;

  KeyRows(const Sequence& s, const Tensor& prefix_tensor, const Tensor& own_tensor, int64_t head)
      : prefix(s.prefix_length > 0 ? prefix_tensor.at<const T>(0, s.prefix_start, head) : nullptr),
        own(s.k_length > 0 ? own_tensor.at<const T>(s.batch, s.k_start, head) : nullptr),
        prefix_stride(prefix_tensor.stride_row),
        own_stride(own_tensor.stride_row),
        prefix_length(s.prefix_length) {}
  const T* operator()(int64_t key) const {
    return key < prefix_length ? prefix + key * prefix_stride : own + (key - prefix_length) * own_stride;
  }
};

// Rows as operands whose depth is the head_dim: out[(i - rows.begin) * padded_words + word] of row(i). The padding and
// `extra_rows` further rows are zero.
template <class T, class Row, class W>
void pack_rows(Row row, Range rows, int64_t extra_rows, int64_t head_dim, W* out) {
  const int64_t padded = padded_words<W>(head_dim);
  for (int64_t i = rows.begin; i < rows.end; ++i, out += padded) {
    const T* in = row(i);
    for (int64_t d = 0, at = 0; d < head_dim; d += kLanes * Word<W>::kNumbers, at += kLanes)
      store(out + at, Word<W>::load_first(in + d, head_dim - d));
  }
  for (int64_t j = 0; j < extra_rows * padded; j += kLanes) store(out + j, zero());
}

// The same rows as operands whose depth runs over the rows, from an even row on: words of kNumbers rows each, over
// padded_head_dim columns.
template <class T, class Row, class W>
void pack_deep_rows(Row row, Range rows, int64_t extra_rows, int64_t head_dim, W* out) {
  if constexpr (Word<W>::kNumbers == 1) {
    pack_rows<T>(row, rows, extra_rows, head_dim, out);
  } else {
    const int64_t padded = padded_head_dim(head_dim);
    W* const end = out + words<W>(maximum<int64_t>(rows.end - rows.begin, 0) + extra_rows) * padded;
    for (int64_t i = rows.begin; i < rows.end; i += 2, out += padded) {
      const T *upper = row(i), *lower = i + 1 < rows.end ? row(i + 1) : upper;
      const int64_t shown = i + 1 < rows.end ? head_dim : 0;
      for (int64_t d = 0; d < head_dim; d += kLanes)
        store(out + d, Word<W>::interleave_first(upper + d, head_dim - d, lower + d, shown - d));
    }
    for (; out < end; out += kLanes) store(out, zero());
  }
}

// Panels of the keys [keys.begin, keys.end), zero beyond; keys.begin is a multiple of kPanel.
template <class T, class Row, class W>
void pack_panels(Row row, Range keys, int64_t head_dim, W* out) {
  const int64_t depth = words<W>(head_dim);
  for (int64_t first = keys.begin; first < keys.end; first += kPanel, out += kPanel * depth) {
    for (int64_t lane_group = 0; lane_group < kPanel; lane_group += kLanes) {
      const int64_t key = first + lane_group;
      for (int64_t at = 0; at < depth; at += kLanes) {
        const int64_t d = at * Word<W>::kNumbers;
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          block[i] = key + i < keys.end ? Word<W>::load_first(row(key + i) + d, head_dim - d) : zero();
        transpose(block);
        const int64_t count = minimum<int64_t>(kLanes, depth - at);
        for (int64_t i = 0; i < count; ++i) store(out + (at + i) * kPanel + lane_group, block[i]);
      }
    }
  }
}

// out[d] = factor * row[d] in the tensor's dtype.
template <class T>
ATMAN_INLINE void unpack_row(const float* row, float factor, int64_t head_dim, T* out) {
  for (int64_t d = 0; d < head_dim; d += kLanes)
    store_first(out + d, mul(load(row + d), broadcast(factor)), head_dim - d);
}

inline void fill(float* out, int64_t count, float value) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, broadcast(value));
}

// The bias of every key: 0 for the prefix and where there is none.
inline void pack_bias(const Problem& p, const Sequence& s, Range keys, float* out) {
  fill(out, round_up(keys.end - keys.begin, kPanel), 0.0f);
  if (!p.key_bias) return;
  for (int64_t key = maximum<int64_t>(keys.begin, s.prefix_length); key < keys.end; ++key)
    out[key - keys.begin] = p.key_bias.at(s.batch, 0, s.k_start + key - s.prefix_length);
}

// before[key] = how many of the keys before `key` are not removed by a bias of -inf, for 0 <= key <= n_keys.
inline void count_kept_keys(const Problem& p, const Sequence& s, int64_t n_keys, int32_t* before) {
  before[0] = 0;
  for (int64_t key = 0; key < n_keys; ++key) {
    const int64_t own = key - s.prefix_length;
    const bool removed = own >= 0 && p.key_bias.at(s.batch, 0, s.k_start + own) == -kInfinity;
    before[key + 1] = before[key] + (removed ? 0 : 1);
  }
}

constexpr int64_t kManyKeys = -1;

// The only key of a range that is not removed, or kManyKeys where there are several or none. Without `before` all are
// kept.
inline int64_t only_key(Range keys, const int32_t* before) {
  if (keys.empty()) return kManyKeys;
  const int64_t count = before == nullptr ? keys.end - keys.begin : before[keys.end] - before[keys.begin];
  if (count != 1) return kManyKeys;
  int64_t key = keys.begin;
  while (before != nullptr && before[key + 1] == before[keys.begin]) ++key;
  return key;
}

}  // namespace atman::ATMAN_ISA
