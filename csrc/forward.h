// o and lse of one task: online softmax over key tiles, one block of query rows at a time.
#pragma once

#include "scores.h"

namespace atman::ATMAN_ISA {

constexpr int64_t kForwardRows = 96;

template <class W>
struct ForwardBuffers {
  W *k_panels, *v_rows, *q, *p;
  float *bias, *o, *scores;
  // Per row: running maximum, factor of the last rescaling, per-lane sums of p and, where wanted, of p times
  // the distance back to the key.
  float *highest, *factor, *sums, *distances;

  ForwardBuffers(Arena& arena, int64_t keys, int64_t rows, int64_t head_dim, bool need_o, bool need_distances) {
    const int64_t padded = padded_head_dim(head_dim), padded_rows = rows + kRowPadding;
    k_panels = arena.take<W>(keys * words<W>(head_dim));
    v_rows = arena.take<W>(need_o ? words<W>(keys) * padded : 0);
    bias = arena.take<float>(keys);
    q = arena.take<W>(padded_rows * padded_words<W>(head_dim));
    p = arena.take<W>(scratch_words<W>(padded_rows));
    o = need_o ? arena.take<float>(padded_rows * padded) : nullptr;
    scores = arena.take<float>(padded_rows * kTileRow);
    highest = arena.take<float>(padded_rows + kLanes);
    factor = arena.take<float>(padded_rows + kLanes);
    sums = arena.take<float>(padded_rows * kLanes);
    distances = need_distances ? arena.take<float>(padded_rows * kLanes) : nullptr;
  }
};

// Turns the scores of one strip into p relative to the new running maximum and updates the row statistics.
template <bool kDistances, class W>
void softmax_strip(const Tile& tile, int64_t row, int64_t rows, Range vectors, const ForwardBuffers<W>& b) {
  [[maybe_unused]] const Vec lanes = lane_numbers();
  alignas(64) float highest[kStrip + kLanes];
  for (int64_t i = 0; i < kStrip + kLanes; ++i) highest[i] = -kInfinity;
  for (int64_t i = 0; i < rows; ++i) {
    const float* s = b.scores + (row + i) * kTileRow;
    Vec m = broadcast(-kInfinity);
    for (int64_t j = vectors.begin; j < vectors.end; ++j) m = max(load(s + j * kLanes), m);
    highest[i] = max_lanes(m);
  }
  // A finite stand-in for the maximum of a row that has seen no key yet: its p stay 0 instead of becoming NaN.
  const Vec lowest = broadcast(kLowest);
  for (int64_t i = 0; i < kStrip; i += kLanes) {
    const Vec before = load(b.highest + row + i);
    const Vec after = max(before, load(highest + i));
    const Vec shift = max(lowest, after);
    store(b.highest + row + i, after);
    store(b.factor + row + i, exp(sub(before, shift)));
    store(highest + i, shift);
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* s = b.scores + (row + i) * kTileRow;
    const Vec shift = broadcast(highest[i]), factor = broadcast(b.factor[row + i]);
    Vec sum = mul(load(b.sums + (row + i) * kLanes), factor);
    // Distances of the lanes of vector 0.
    [[maybe_unused]] Vec back, distance;
    if constexpr (kDistances) {
      back = sub(broadcast(tile.distance(row + i)), lanes);
      distance = mul(load(b.distances + (row + i) * kLanes), factor);
    }
    for (int64_t j = vectors.begin; j < vectors.end; ++j) {
      const Vec p = exp(sub(load(s + j * kLanes), shift));
      store(s + j * kLanes, p);
      sum = add(sum, p);
      if constexpr (kDistances)
        distance = fma(p, sub(back, broadcast(static_cast<float>(j * kLanes))), distance);
    }
    store(b.sums + (row + i) * kLanes, sum);
    if constexpr (kDistances) store(b.distances + (row + i) * kLanes, distance);
  }
}

// Adds one key tile to the block's running o, highest and sums.
template <class W>
void forward_tile(const Tile& tile, const W* k_panels, const W* v_rows, const float* bias, float sm_scale,
                  int64_t head_dim, const ForwardBuffers<W>& b) {
  const Range all = tile.vectors();
  if (all.empty()) return;
  const int64_t padded = padded_head_dim(head_dim);
  const Vec scale = broadcast(sm_scale);
  for (int64_t panel = all.begin / kTileVectors; panel * kTileVectors < all.end; ++panel) {
    multiply_panel(tile, panel, b.q, padded_words<W>(head_dim), k_panels + panel * kPanel * words<W>(head_dim),
                   head_dim, [&](auto mr, auto nv, int64_t row, int64_t vector, const auto& acc) {
                     for (int j = 0; j < nv; ++j) {
                       const Vec added = load(bias + (vector + j) * kLanes);
                       float* s = b.scores + row * kTileRow + (vector + j) * kLanes;
                       for (int i = 0; i < mr; ++i) store(s + i * kTileRow, fma(acc[i][j], scale, added));
                     }
                   });
  }
  const bool edge = tile.has_edge();
  fill(b.factor, tile.rows, 1.0f);
  for (int64_t row = 0; row < tile.rows; row += kStrip) {
    const int64_t rows = minimum<int64_t>(kStrip, tile.rows - row);
    const Range vectors = tile.strip_vectors(row);
    if (edge) {
      hide_edges(tile, row, vectors, -kInfinity, b.scores);
      clear_outside(all, vectors, row, rows, b.scores);
    }
    if (vectors.empty()) continue;
    if (b.distances == nullptr)
      softmax_strip<false>(tile, row, rows, vectors, b);
    else
      softmax_strip<true>(tile, row, rows, vectors, b);
  }
  if (b.o == nullptr) return;
  accumulate(over_keys(b.scores, tile.rows, all, b.p), v_rows, padded, b.o, padded, {0, tile.rows}, padded / kLanes,
             b.factor, [&](int64_t first, int64_t last) {
               const Range needed = tile.vectors(first, last);
               return words<W>(Range{needed.begin * kLanes, needed.end * kLanes});
             });
}

template <class T>
void forward_task(const Forward& f, const Task& task, Arena& arena, bool run) {
  const Sequence& s = f.sequences[task.sequence];
  const Visibility visible(f, s);
  const int64_t head_dim = f.head_dim, padded = padded_head_dim(head_dim);
  Range keys = visible.keys(task.row_begin, task.row_end - 1);
  keys.begin = round_down(keys.begin, kKeyTile);
  const int64_t n_keys = keys.empty() ? 0 : round_up(keys.end - keys.begin, kPanel);
  const int64_t block = minimum<int64_t>(kForwardRows, task.row_end - task.row_begin);
  using W = Packed<T>;
  const ForwardBuffers<W> b(arena, n_keys, block, head_dim, static_cast<bool>(f.o), static_cast<bool>(f.distance));
  if (!run) return;

  pack_panels<T>(KeyRows<T>(s, f.prefix_k, f.k, task.head_kv), keys, head_dim, b.k_panels);
  if (f.o)
    pack_deep_rows<T>(KeyRows<T>(s, f.prefix_v, f.v, task.head_kv), keys,
                      n_keys - maximum<int64_t>(keys.end - keys.begin, 0), head_dim, b.v_rows);
  pack_bias(f, s, keys, b.bias);
  fill(b.scores + block * kTileRow, kRowPadding * kTileRow, 0.0f);
  for (int64_t head = task.head_kv * f.group(); head < (task.head_kv + 1) * f.group(); ++head) {
    for (int64_t first = task.row_begin; first < task.row_end; first += kForwardRows) {
      const int64_t rows = minimum<int64_t>(kForwardRows, task.row_end - first);
      const auto q_row = [&](int64_t row) { return f.q.at<const T>(s.batch, s.q_start + row, head); };
      pack_rows<T>(q_row, {first, first + rows}, kRowPadding, head_dim, b.q);
      if (f.o) fill(b.o, (rows + kRowPadding) * padded, 0.0f);
      fill(b.highest, rows, -kInfinity);
      fill(b.sums, rows * kLanes, 0.0f);
      if (f.distance) fill(b.distances, rows * kLanes, 0.0f);
      const Range seen = visible.keys(first, first + rows - 1);
      for (int64_t key = round_down(seen.begin, kKeyTile); key < seen.end; key += kKeyTile) {
        const int64_t at = key - keys.begin;
        forward_tile({visible, first, rows, key}, b.k_panels + at * words<W>(head_dim),
                     b.v_rows + words<W>(at) * padded, b.bias + at, f.sm_scale, head_dim, b);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const float sum = sum_lanes(load(b.sums + i * kLanes));
        const int64_t row = s.q_start + first + i;
        const float log_sum = __builtin_logf(sum);
        if (f.o)
          unpack_row(b.o + i * padded, sum == 0.0f ? 0.0f : 1.0f / sum, head_dim, f.o.at<T>(s.batch, row, head));
        if (f.lse) f.lse.at(s.batch, head, row) = sum == 0.0f ? -kInfinity : b.highest[i] + log_sum;
        if (f.split.highest) {
          f.split.highest.at(s.batch, head, row) = b.highest[i];
          f.split.log_sum.at(s.batch, head, row) = log_sum;
        }
        if (f.distance)
          f.distance.at(s.batch, head, row) = sum == 0.0f ? 0.0f : sum_lanes(load(b.distances + i * kLanes)) / sum;
      }
    }
  }
}

}  // namespace atman::ATMAN_ISA
