// Gradients of one task. Query blocks run outside and key tiles inside: dq of a block is finished in one go, dk and dv of
// the task's keys accumulate in fp32 until its end.
#pragma once

#include "scores.h"

namespace atman::ATMAN_ISA {

constexpr int64_t kBackwardRows = 96;

struct BackwardBuffers {
  float *k_panels, *v_panels, *k_rows, *bias_log2, *dkey_bias;
  // Accumulators of the tiles that hold keys of the sequence itself; a prefix gets no gradient.
  float *dk, *dv;
  float *q, *d_o, *dq, *p, *ds;
  float *lse_log2, *delta;

  BackwardBuffers(Arena& arena, const Backward& g, int64_t keys, int64_t own_keys, int64_t rows) {
    const int64_t padded = padded_head_dim(g.head_dim), padded_rows = rows + kRowPadding;
    k_panels = arena.take<float>(keys * g.head_dim);
    v_panels = arena.take<float>(keys * g.head_dim);
    k_rows = arena.take<float>(g.dq ? keys * padded : 0);
    bias_log2 = arena.take<float>(keys);
    dkey_bias = arena.take<float>(keys);
    dk = arena.take<float>(g.dk ? (own_keys + kRowPadding) * padded : 0);
    dv = arena.take<float>(g.dv ? (own_keys + kRowPadding) * padded : 0);
    q = arena.take<float>(padded_rows * padded);
    d_o = arena.take<float>(padded_rows * padded);
    dq = arena.take<float>(g.dq ? padded_rows * padded : 0);
    p = arena.take<float>(padded_rows * kTileRow + kRowPadding);
    ds = arena.take<float>(padded_rows * kTileRow + kRowPadding);
    lse_log2 = arena.take<float>(padded_rows);
    delta = arena.take<float>(padded_rows);
  }
};

// Query rows of one head, packed, with what the backward needs to know of each.
template <class T>
void load_block(const Backward& g, const Sequence& s, int64_t head, int64_t first, int64_t rows,
                const BackwardBuffers& b) {
  const auto q_row = [&](int64_t row) { return g.q.at<const T>(s.batch, s.q_start + row, head); };
  const auto do_row = [&](int64_t row) { return g.d_o.at<const T>(s.batch, s.q_start + row, head); };
  pack_rows<T>(q_row, {first, first + rows}, kRowPadding, g.head_dim, b.q);
  pack_rows<T>(do_row, {first, first + rows}, kRowPadding, g.head_dim, b.d_o);
  for (int64_t i = 0; i < rows; ++i) {
    const float lse = g.lse.at(s.batch, head, s.q_start + first + i);
    // A row without a key gets p = 2^-inf = 0.
    b.lse_log2[i] = lse == -kInfinity ? kInfinity : lse * kLog2E;
  }
  for (int64_t i = rows; i < rows + kRowPadding; ++i) b.lse_log2[i] = kInfinity, b.delta[i] = 0.0f;
}

// delta - dlse of each row: ds = p (dp - delta + dlse).
template <class T>
void load_row_terms(const Backward& g, const Sequence& s, int64_t head, int64_t first, int64_t rows,
                    const BackwardBuffers& b) {
  const int64_t padded = padded_head_dim(g.head_dim);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = s.q_start + first + i;
    if (g.delta) {
      b.delta[i] = g.delta.at(s.batch, head, row);
    } else {
      const T* o = g.o.at<const T>(s.batch, row, head);
      Vec sum = zero();
      for (int64_t d = 0; d < g.head_dim; d += kLanes)
        sum = fma(load(b.d_o + i * padded + d), load_first(o + d, g.head_dim - d), sum);
      b.delta[i] = sum_lanes(sum);
    }
    if (g.dlse) b.delta[i] -= g.dlse.at(s.batch, head, row);
  }
}

// p of one panel of the tile, 0 where a row does not see the key.
inline void panel_p(const Tile& tile, int64_t panel, const float* k_panel, const float* bias_log2, float scale_log2,
                    int64_t head_dim, const BackwardBuffers& b) {
  const Vec scale = broadcast(scale_log2);
  multiply_panel(tile, panel, b.q, padded_head_dim(head_dim), k_panel, head_dim,
                 [&](auto mr, auto nv, int64_t row, int64_t vector, const auto& acc) {
                   for (int j = 0; j < nv; ++j) {
                     const Vec bias = load(bias_log2 + (vector + j) * kLanes);
                     float* p = b.p + row * kTileRow + (vector + j) * kLanes;
                     for (int i = 0; i < mr; ++i) {
                       const Vec shift = sub(bias, broadcast(b.lse_log2[row + i]));
                       store(p + i * kTileRow, exp2(fma(acc[i][j], scale, shift)));
                     }
                   }
                   if (!tile.has_edge()) return;
                   hide_edges(tile, row, {vector, vector + nv}, 0.0f, b.p);
                 });
}

// ds = p (dp - delta) of one panel; its column sums are added to the key bias gradient.
inline void panel_ds(const Tile& tile, int64_t panel, const float* v_panel, int64_t head_dim, float* dkey_bias,
                     bool keep, const BackwardBuffers& b) {
  multiply_panel(tile, panel, b.d_o, padded_head_dim(head_dim), v_panel, head_dim,
                 [&](auto mr, auto nv, int64_t row, int64_t vector, const auto& acc) {
                   for (int j = 0; j < nv; ++j) {
                     const int64_t column = (vector + j) * kLanes;
                     Vec sum = load(dkey_bias + column);
                     for (int i = 0; i < mr; ++i) {
                       const int64_t at = (row + i) * kTileRow + column;
                       const Vec ds = mul(load(b.p + at), sub(acc[i][j], broadcast(b.delta[row + i])));
                       if (keep) store(b.ds + at, ds);
                       sum = add(sum, ds);
                     }
                     store(dkey_bias + column, sum);
                   }
                 });
}

// Everything that one tile of keys contributes. `own` says whether it holds keys of the sequence itself.
inline void backward_tile(const Backward& g, const Tile& tile, int64_t at, int64_t own_at, bool own,
                          const BackwardBuffers& b) {
  const Range all = tile.vectors();
  if (all.empty()) return;
  const int64_t head_dim = g.head_dim, padded = padded_head_dim(head_dim);
  const bool want_dk = own && g.dk, want_dv = own && g.dv;
  const bool keep_ds = want_dk || g.dq;
  for (int64_t panel = all.begin / kTileVectors; panel * kTileVectors < all.end; ++panel) {
    const int64_t offset = (at + panel * kPanel) * head_dim;
    panel_p(tile, panel, b.k_panels + offset, b.bias_log2 + at, g.sm_scale * kLog2E, head_dim, b);
    if (keep_ds || g.need_dkey_bias)
      panel_ds(tile, panel, b.v_panels + offset, head_dim, b.dkey_bias + at, keep_ds, b);
  }
  if (tile.has_edge()) {
    for (int64_t row = 0; row < tile.rows; row += kStrip) {
      const int64_t rows = minimum<int64_t>(kStrip, tile.rows - row);
      clear_outside(all, tile.strip_vectors(row), row, rows, b.p);
      clear_outside(all, tile.strip_vectors(row), row, rows, b.ds);
    }
  }
  const Range keys{all.begin * kLanes, all.end * kLanes};
  const auto rows_of_keys = [&](int64_t first, int64_t last) { return tile.key_rows(first, last); };
  if (want_dv)
    accumulate({b.p, 1, kTileRow}, b.d_o, padded, b.dv + own_at * padded, padded, keys, padded / kLanes, nullptr,
               rows_of_keys);
  if (want_dk)
    accumulate({b.ds, 1, kTileRow}, b.q, padded, b.dk + own_at * padded, padded, keys, padded / kLanes, nullptr,
               rows_of_keys);
  if (g.dq)
    accumulate({b.ds, kTileRow, 1}, b.k_rows + at * padded, padded, b.dq, padded, {0, tile.rows}, padded / kLanes,
               nullptr, [&](int64_t first, int64_t last) {
                 const Range needed = tile.vectors(first, last);
                 return Range{needed.begin * kLanes, needed.end * kLanes};
               });
}

template <class T>
void backward_task(const Backward& g, const Task& task, Arena& arena, bool run) {
  const Sequence& s = g.sequences[task.sequence];
  const Visibility visible(g, s);
  const int64_t head_dim = g.head_dim, padded = padded_head_dim(head_dim);
  const Range keys{task.key_begin, task.key_end};
  const int64_t n_keys = round_up(keys.end - keys.begin, kKeyTile);
  // The first tile of the task with a key of the sequence itself.
  const int64_t own_begin = maximum<int64_t>(round_down(s.prefix_length, kKeyTile), keys.begin);
  const int64_t own_keys = maximum<int64_t>(round_up(keys.end - own_begin, kKeyTile), 0);
  const int64_t block = minimum<int64_t>(kBackwardRows, visible.n_rows);
  const BackwardBuffers b(arena, g, n_keys, own_keys, block);
  if (!run) return;

  const KeyRows<T> k_row(s, g.prefix_k, g.k, task.head_kv), v_row(s, g.prefix_v, g.v, task.head_kv);
  pack_panels<T>(k_row, keys, head_dim, b.k_panels);
  pack_panels<T>(v_row, keys, head_dim, b.v_panels);
  if (g.dq) pack_rows<T>(k_row, keys, n_keys - (keys.end - keys.begin), head_dim, b.k_rows);
  pack_bias(g, s, keys, b.bias_log2);
  fill(b.dkey_bias, n_keys, 0.0f);
  if (g.dk) fill(b.dk, (own_keys + kRowPadding) * padded, 0.0f);
  if (g.dv) fill(b.dv, (own_keys + kRowPadding) * padded, 0.0f);
  fill(b.p, (block + kRowPadding) * kTileRow, 0.0f);
  fill(b.ds, (block + kRowPadding) * kTileRow, 0.0f);

  for (int64_t head = task.head_kv * g.group(); head < (task.head_kv + 1) * g.group(); ++head) {
    for (int64_t first = 0; first < visible.n_rows; first += kBackwardRows) {
      const int64_t rows = minimum<int64_t>(kBackwardRows, visible.n_rows - first);
      const Range seen = visible.keys(first, first + rows - 1);
      const Range part{maximum(seen.begin, keys.begin), minimum(seen.end, keys.end)};
      if (!part.empty()) {
        load_block<T>(g, s, head, first, rows, b);
        load_row_terms<T>(g, s, head, first, rows, b);
      }
      if (g.dq) fill(b.dq, (rows + kRowPadding) * padded, 0.0f);
      for (int64_t key = round_down(part.begin, kKeyTile); key < part.end; key += kKeyTile)
        backward_tile(g, {visible, first, rows, key}, key - keys.begin, key - own_begin, key >= own_begin, b);
      if (!g.dq) continue;
      for (int64_t i = 0; i < rows; ++i) {
        const float* dq = b.dq + i * padded;
        if (task.dq_partial == nullptr) {
          unpack_row(dq, g.sm_scale, head_dim, g.dq.at<T>(s.batch, s.q_start + first + i, head));
        } else {
          const int64_t row = (head - task.head_kv * g.group()) * visible.n_rows + first + i;
          unpack_row(dq, g.sm_scale, head_dim, task.dq_partial + row * head_dim);
        }
      }
    }
  }
  for (int64_t key = maximum<int64_t>(keys.begin, s.prefix_length); key < keys.end; ++key) {
    const int64_t own = key - s.prefix_length, row = s.k_start + own;
    const int64_t at = (key - own_begin) * padded;
    if (g.dk) unpack_row(b.dk + at, g.sm_scale, head_dim, g.dk.at<T>(s.batch, row, task.head_kv));
    if (g.dv) unpack_row(b.dv + at, 1.0f, head_dim, g.dv.at<T>(s.batch, row, task.head_kv));
    if (task.dkey_bias != nullptr) task.dkey_bias[own] = b.dkey_bias[key - keys.begin];
  }
}

// delta = sum_v p dp from unrounded p and dp, for the rows of a task. Costs the two score products again, and is what
// keeps the key bias gradient exact where o was rounded to 16 bits.
template <class T>
void delta_task(const Backward& g, const Task& task, Arena& arena, bool run) {
  const Sequence& s = g.sequences[task.sequence];
  const Visibility visible(g, s);
  const int64_t head_dim = g.head_dim;
  Range keys = visible.keys(task.row_begin, task.row_end - 1);
  keys.begin = round_down(keys.begin, kKeyTile);
  const int64_t n_keys = keys.empty() ? 0 : round_up(keys.end - keys.begin, kKeyTile);
  const int64_t block = minimum<int64_t>(kBackwardRows, task.row_end - task.row_begin);
  Backward rows_only = g;
  rows_only.dq = rows_only.dk = rows_only.dv = Tensor{};
  const BackwardBuffers b(arena, rows_only, n_keys, 0, block);
  if (!run) return;

  pack_panels<T>(KeyRows<T>(s, g.prefix_k, g.k, task.head_kv), keys, head_dim, b.k_panels);
  pack_panels<T>(KeyRows<T>(s, g.prefix_v, g.v, task.head_kv), keys, head_dim, b.v_panels);
  pack_bias(g, s, keys, b.bias_log2);
  fill(b.dkey_bias, n_keys, 0.0f);
  for (int64_t head = task.head_kv * g.group(); head < (task.head_kv + 1) * g.group(); ++head) {
    for (int64_t first = task.row_begin; first < task.row_end; first += kBackwardRows) {
      const int64_t rows = minimum<int64_t>(kBackwardRows, task.row_end - first);
      load_block<T>(g, s, head, first, rows, b);
      fill(b.delta, rows, 0.0f);
      float* sums = b.ds;
      fill(sums, rows * kLanes, 0.0f);
      const Range seen = visible.keys(first, first + rows - 1);
      for (int64_t key = round_down(seen.begin, kKeyTile); key < seen.end; key += kKeyTile) {
        const Tile tile{visible, first, rows, key};
        const Range all = tile.vectors();
        for (int64_t panel = all.begin / kTileVectors; panel * kTileVectors < all.end; ++panel) {
          const int64_t at = key - keys.begin, offset = (at + panel * kPanel) * head_dim;
          panel_p(tile, panel, b.k_panels + offset, b.bias_log2 + at, g.sm_scale * kLog2E, head_dim, b);
          multiply_panel(tile, panel, b.d_o, padded_head_dim(head_dim), b.v_panels + offset, head_dim,
                         [&](auto mr, auto nv, int64_t row, int64_t vector, const auto& acc) {
                           for (int i = 0; i < minimum<int64_t>(mr, rows - row); ++i) {
                             Vec sum = load(sums + (row + i) * kLanes);
                             const float* p = b.p + (row + i) * kTileRow + vector * kLanes;
                             for (int j = 0; j < nv; ++j) sum = fma(load(p + j * kLanes), acc[i][j], sum);
                             store(sums + (row + i) * kLanes, sum);
                           }
                         });
        }
      }
      for (int64_t i = 0; i < rows; ++i)
        g.delta.at(s.batch, head, s.q_start + first + i) = sum_lanes(load(sums + i * kLanes));
    }
  }
}

template <class T>
void sum_dq_task(const Backward& g, const Task& task, const float* partials, int64_t count) {
  const Sequence& s = g.sequences[task.sequence];
  const int64_t rows = s.q_length, head_dim = g.head_dim, size = g.group() * rows * head_dim;
  for (int64_t i = 0; i < g.group(); ++i) {
    for (int64_t row = 0; row < rows; ++row) {
      const float* partial = partials + (i * rows + row) * head_dim;
      T* out = g.dq.at<T>(s.batch, s.q_start + row, task.head_kv * g.group() + i);
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        Vec sum = zero();
        for (int64_t j = 0; j < count; ++j) sum = add(sum, load_first(partial + j * size + d, head_dim - d));
        store_first(out + d, sum, head_dim - d);
      }
    }
  }
}

}  // namespace atman::ATMAN_ISA
