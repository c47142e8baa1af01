// Row sums and column sums of the attention map, one tile of it at a time.
#pragma once

#include "scores.h"

namespace atman::ATMAN_ISA {

constexpr int64_t kStatisticsRows = 96;

template <class W>
struct StatisticsBuffers {
  W *k_panels, *q;
  float *bias, *scores, *lse, *log_sum;
  // Per row of a block and lane, or per key of a tile.
  float* sums;

  StatisticsBuffers(Arena& arena, int64_t keys, int64_t head_dim) {
    const int64_t padded_rows = kStatisticsRows + kRowPadding;
    k_panels = arena.take<W>(keys * words<W>(head_dim));
    bias = arena.take<float>(keys);
    q = arena.take<W>(padded_rows * padded_words<W>(head_dim));
    scores = arena.take<float>(padded_rows * kTileRow);
    lse = arena.take<float>(padded_rows);
    log_sum = arena.take<float>(padded_rows);
    sums = arena.take<float>(maximum<int64_t>(padded_rows * kLanes, kKeyTile));
  }
};

template <class T>
void pack_statistics_rows(const Statistics& p, const Sequence& s, int64_t head, int64_t first, int64_t rows,
                          const StatisticsBuffers<Packed<T>>& b) {
  const auto q_row = [&](int64_t row) { return p.q.at<const T>(s.batch, s.q_start + row, head); };
  pack_rows<T>(q_row, {first, first + rows}, kRowPadding, p.head_dim, b.q);
  for (int64_t i = 0; i < rows; ++i) {
    const float lse = p.lse.at(s.batch, head, s.q_start + first + i);
    // A row without a key has p = 0.
    b.lse[i] = lse == -kInfinity ? kInfinity : lse;
    b.log_sum[i] = 0.0f;
    if (p.split.highest && needs_split(lse)) {
      b.lse[i] = p.split.highest.at(s.batch, head, s.q_start + first + i);
      b.log_sum[i] = p.split.log_sum.at(s.batch, head, s.q_start + first + i);
    }
  }
}

// Calls each(row, vectors) for every row of the tile that sees a key of it, with p in the row's scores.
template <class W, class Each>
void for_each_row(const Tile& tile, const Statistics& p, const W* k_panels, const float* bias,
                  const StatisticsBuffers<W>& b, Each each) {
  const Range all = tile.vectors();
  if (all.empty()) return;
  const Vec scale = broadcast(p.sm_scale);
  for (int64_t panel = all.begin / kTileVectors; panel * kTileVectors < all.end; ++panel) {
    multiply_panel(tile, panel, b.q, padded_words<W>(p.head_dim), k_panels + panel * kPanel * words<W>(p.head_dim),
                   p.head_dim, [&](auto mr, auto nv, int64_t row, int64_t vector, const auto& acc) {
                     for (int j = 0; j < nv; ++j) {
                       const Vec added = load(bias + (vector + j) * kLanes);
                       float* s = b.scores + row * kTileRow + (vector + j) * kLanes;
                       for (int i = 0; i < mr; ++i) store(s + i * kTileRow, fma(acc[i][j], scale, added));
                     }
                   });
  }
  const bool edge = tile.has_edge();
  for (int64_t strip = 0; strip < tile.rows; strip += kStrip) {
    const Range vectors = tile.strip_vectors(strip);
    if (vectors.empty()) continue;
    if (edge) hide_edges(tile, strip, vectors, -kInfinity, b.scores);
    for (int64_t row = strip; row < minimum<int64_t>(strip + kStrip, tile.rows); ++row) {
      float* s = b.scores + row * kTileRow;
      const Vec lse = broadcast(b.lse[row]), log_sum = broadcast(b.log_sum[row]);
      for (int64_t j = vectors.begin; j < vectors.end; ++j)
        store(s + j * kLanes, exp(sub(sub(load(s + j * kLanes), lse), log_sum)));
      each(row, vectors);
    }
  }
}

template <class T>
void row_statistics_task(const Statistics& p, const Task& task, Arena& arena, bool run) {
  const Sequence& s = p.sequences[task.sequence];
  const Visibility visible(p, s);
  Range keys = visible.keys(task.row_begin, task.row_end - 1);
  keys.begin = round_down(keys.begin, kKeyTile);
  const int64_t n_keys = keys.empty() ? 0 : round_up(keys.end - keys.begin, kKeyTile);
  using W = Packed<T>;
  const StatisticsBuffers<W> b(arena, n_keys, p.head_dim);
  if (!run) return;

  pack_panels<T>(KeyRows<T>(s, p.prefix_k, p.k, task.head_kv), keys, p.head_dim, b.k_panels);
  pack_bias(p, s, keys, b.bias);
  const Vec lanes = lane_numbers();
  // The sum is subtracted from it: its rounding must not exceed that of distances in the sequence.
  const float reach = p.near ? static_cast<float>(minimum<int64_t>(p.window, visible.n_keys)) : 0.0f;
  for (int64_t first = task.row_begin; first < task.row_end; first += kStatisticsRows) {
    const int64_t rows = minimum<int64_t>(kStatisticsRows, task.row_end - first);
    bool any = p.near;
    for (int64_t i = 0; i < rows && !any; ++i) any = p.is_chosen(s.batch, s.q_start + first + i);
    const Range seen = visible.keys(first, first + rows - 1);
    for (int64_t head = task.head_kv * p.group(); any && head < (task.head_kv + 1) * p.group(); ++head) {
      pack_statistics_rows<T>(p, s, head, first, rows, b);
      fill(b.sums, rows * kLanes, 0.0f);
      for (int64_t key = round_down(seen.begin, kKeyTile); key < seen.end; key += kKeyTile) {
        const int64_t at = key - keys.begin;
        const Tile tile{visible, first, rows, key};
        const auto* panels = b.k_panels + at * words<W>(p.head_dim);
        for_each_row(tile, p, panels, b.bias + at, b, [&](int64_t row, Range vectors) {
          const float back = tile.distance(row);
          Vec sum = load(b.sums + row * kLanes);
          for (int64_t j = vectors.begin; j < vectors.end; ++j) {
            const Vec key_in_tile = add(lanes, broadcast(static_cast<float>(j * kLanes)));
            const Vec d = sub(broadcast(back), key_in_tile);
            const Vec weight = p.near ? max(sub(broadcast(reach), d), zero()) : d;
            sum = fma(load(b.scores + row * kTileRow + j * kLanes), weight, sum);
          }
          store(b.sums + row * kLanes, sum);
        });
      }
      for (int64_t i = 0; i < rows; ++i) {
        const float sum = sum_lanes(load(b.sums + i * kLanes));
        const bool without_key = b.lse[i] == kInfinity;
        // The p of a row sum to 1: sum p min(d, W) = W - sum p max(W - d, 0).
        p.row_sums.at(s.batch, head, s.q_start + first + i) = without_key ? 0.0f : p.near ? reach - sum : sum;
      }
    }
  }
}

template <class T>
void column_statistics_task(const Statistics& p, const Task& task, Arena& arena, bool run) {
  const Sequence& s = p.sequences[task.sequence];
  // Distances low .. high are a window that ends `low` positions before the row.
  Visibility band(p, s);
  const int64_t high = minimum<int64_t>(p.high, p.window - 1);
  band.shift -= p.low;
  band.window = high - p.low + 1;
  const StatisticsBuffers<Packed<T>> b(arena, kKeyTile, p.head_dim);
  if (!run) return;

  const int64_t first_own = maximum<int64_t>(task.key_begin, s.prefix_length);
  for (int64_t key = round_down(first_own, kKeyTile); key < task.key_end; key += kKeyTile) {
    const Range keys{key, minimum<int64_t>(key + kKeyTile, band.n_keys)};
    pack_panels<T>(KeyRows<T>(s, p.prefix_k, p.k, task.head_kv), keys, p.head_dim, b.k_panels);
    pack_bias(p, s, keys, b.bias);
    const Range needed = band.window > 0 ? band.rows(keys.begin, keys.end - 1) : Range{0, 0};
    for (int64_t head = task.head_kv * p.group(); head < (task.head_kv + 1) * p.group(); ++head) {
      fill(b.sums, kKeyTile, 0.0f);
      for (int64_t first = needed.begin; first < needed.end; first += kStatisticsRows) {
        const int64_t rows = minimum<int64_t>(kStatisticsRows, needed.end - first);
        pack_statistics_rows<T>(p, s, head, first, rows, b);
        const Tile tile{band, first, rows, key};
        for_each_row(tile, p, b.k_panels, b.bias, b, [&](int64_t row, Range vectors) {
          if (!p.is_chosen(s.batch, s.q_start + first + row)) return;
          for (int64_t j = vectors.begin; j < vectors.end; ++j)
            store(b.sums + j * kLanes,
                  add(load(b.sums + j * kLanes), load(b.scores + row * kTileRow + j * kLanes)));
        });
      }
      for (int64_t own = maximum<int64_t>(key, first_own); own < minimum<int64_t>(keys.end, task.key_end); ++own) {
        const int64_t at = s.k_start + own - s.prefix_length;
        const int32_t count = p.received_count[s.batch * p.stride_count + at];
        p.received.at(s.batch, head, at) = count == 0 ? 0.0f : b.sums[own - key] / static_cast<float>(count);
      }
    }
  }
}

}  // namespace atman::ATMAN_ISA
