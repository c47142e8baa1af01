// Gradients of one task. Query blocks run outside and key tiles inside: dq of a block is finished in one go, dk and dv
// of the task's keys accumulate in fp32 until its end.
#pragma once

#include "backward_tile.h"

namespace atman::ATMAN_ISA {

// Everything that one block of query rows contributes to the keys [part.begin, part.end).
template <class T, class W>
void backward_block(const Backward& g, const Sequence& s, const Visibility& visible, int64_t head, int64_t first,
                    int64_t rows, Range part, bool sees_only_part, int64_t keys_begin, int64_t own_begin,
                    const BackwardBuffers<W>& b) {
  const int64_t head_dim = g.head_dim, padded = padded_head_dim(head_dim);
  const int64_t first_key = round_down(part.begin, kKeyTile);
  const bool want_ds = g.dq || g.dk || g.need_dkey_bias, keep_ds = g.dq || g.dk;
  const bool kept = sees_only_part && part.end - first_key <= kKeptTiles * kKeyTile;
  const auto operands = [&](int64_t key) {
    return Operands<W>(visible, first, rows, key, key - keys_begin, kept ? (key - first_key) / kKeyTile : 0, head_dim,
                       b);
  };
  load_block<T>(g, s, visible, head, first, rows, b);
  if (kept && want_ds) {
    clear_sums(rows, b);
    for (int64_t key = first_key; key < part.end; key += kKeyTile) {
      const Operands<W> t = operands(key);
      for_panels(t.tile, [&](int64_t panel) {
        panel_p(t, panel, g, b);
        panel_dp(t, panel, g, true, b);
      });
    }
    set_delta_from_sums(rows, b);
  } else if (want_ds) {
    load_delta<T>(g, s, head, first, rows, b);
  }
  subtract_dlse(g, s, head, first, rows, b);
  for (int64_t key = first_key; key < part.end; key += kKeyTile) {
    const Operands<W> t = operands(key);
    if (t.tile.vectors().empty()) continue;
    if (kept && want_ds) {
      kept_ds(t, b);
    } else {
      for_panels(t.tile, [&](int64_t panel) {
        panel_p(t, panel, g, b);
        if (want_ds) panel_ds(t, panel, g, keep_ds, b);
      });
    }
    set_only_keys(t, g, s, head, b);
    const bool own = key >= own_begin;
    tile_products(t, g, b.k_rows + words<W>(key - keys_begin) * padded,
                  own && g.dk ? b.dk + (key - own_begin) * padded : nullptr,
                  own && g.dv ? b.dv + (key - own_begin) * padded : nullptr, b);
  }
}

template <class T>
void backward_task(const Backward& g, const Task& task, Arena& arena, bool run) {
  const Sequence& s = g.sequences[task.sequence];
  const Visibility visible(g, s);
  const int64_t head_dim = g.head_dim, padded = padded_head_dim(head_dim);
  const Range keys{task.key_begin, task.key_end};
  const int64_t n_keys = round_up(keys.end - keys.begin, kPanel);
  // The first tile of the task with a key of the sequence itself.
  const int64_t own_begin = maximum<int64_t>(round_down(s.prefix_length, kKeyTile), keys.begin);
  const int64_t own_keys = maximum<int64_t>(round_up(keys.end - own_begin, kPanel), 0);
  const int64_t block = minimum<int64_t>(kBackwardRows, visible.n_rows);
  using W = Packed<T>;
  const BackwardBuffers<W> b(arena, g, n_keys, own_keys, block, visible.n_keys);
  if (!run) return;

  const KeyRows<T> k_row(s, g.prefix_k, g.k, task.head_kv), v_row(s, g.prefix_v, g.v, task.head_kv);
  pack_panels<T>(k_row, keys, head_dim, b.k_panels);
  pack_panels<T>(v_row, keys, head_dim, b.v_panels);
  if (g.dq) pack_deep_rows<T>(k_row, keys, n_keys - (keys.end - keys.begin), head_dim, b.k_rows);
  pack_bias(g, s, keys, b.bias);
  if (g.key_bias) count_kept_keys(g, s, visible.n_keys, b.kept_before);
  fill(b.dkey_bias, n_keys, 0.0f);
  if (g.dk) fill(b.dk, (own_keys + kRowPadding) * padded, 0.0f);
  if (g.dv) fill(b.dv, (own_keys + kRowPadding) * padded, 0.0f);

  const int64_t first_head = task.head_kv * g.group();
  for (int64_t head = first_head; head < first_head + g.group(); ++head) {
    for (int64_t first = 0; first < visible.n_rows; first += kBackwardRows) {
      const int64_t rows = minimum<int64_t>(kBackwardRows, visible.n_rows - first);
      const Range seen = visible.keys(first, first + rows - 1);
      const Range part{maximum(seen.begin, keys.begin), minimum(seen.end, keys.end)};
      if (g.dq) fill(b.dq, (rows + kRowPadding) * padded, 0.0f);
      if (!part.empty())
        backward_block<T>(g, s, visible, head, first, rows, part, part.begin == seen.begin && part.end == seen.end,
                          keys.begin, own_begin, b);
      if (!g.dq) continue;
      for (int64_t i = 0; i < rows; ++i) {
        const float* dq = b.dq + i * padded;
        if (task.dq_partial == nullptr) {
          unpack_row(dq, g.sm_scale, head_dim, g.dq.at<T>(s.batch, s.q_start + first + i, head));
        } else {
          const int64_t row = (head - first_head) * visible.n_rows + first + i;
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

// delta = sum_v p dp / sum_v p from unrounded p and dp, for the rows of a task: two products more, where p and dp of a
// row cannot be kept and o was rounded to 16 bits.
template <class T>
void delta_task(const Backward& g, const Task& task, Arena& arena, bool run) {
  const Sequence& s = g.sequences[task.sequence];
  const Visibility visible(g, s);
  const int64_t head_dim = g.head_dim;
  Range keys = visible.keys(task.row_begin, task.row_end - 1);
  keys.begin = round_down(keys.begin, kKeyTile);
  const int64_t n_keys = keys.empty() ? 0 : round_up(keys.end - keys.begin, kPanel);
  const int64_t block = minimum<int64_t>(kBackwardRows, task.row_end - task.row_begin);
  Backward rows_only = g;
  rows_only.dq = rows_only.dk = rows_only.dv = Tensor{};
  using W = Packed<T>;
  const BackwardBuffers<W> b(arena, rows_only, n_keys, 0, block, visible.n_keys);
  if (!run) return;

  pack_panels<T>(KeyRows<T>(s, g.prefix_k, g.k, task.head_kv), keys, head_dim, b.k_panels);
  pack_panels<T>(KeyRows<T>(s, g.prefix_v, g.v, task.head_kv), keys, head_dim, b.v_panels);
  pack_bias(g, s, keys, b.bias);
  if (g.key_bias) count_kept_keys(g, s, visible.n_keys, b.kept_before);
  for (int64_t head = task.head_kv * g.group(); head < (task.head_kv + 1) * g.group(); ++head) {
    for (int64_t first = task.row_begin; first < task.row_end; first += kBackwardRows) {
      const int64_t rows = minimum<int64_t>(kBackwardRows, task.row_end - first);
      load_block<T>(g, s, visible, head, first, rows, b);
      clear_sums(rows, b);
      const Range seen = visible.keys(first, first + rows - 1);
      for (int64_t key = round_down(seen.begin, kKeyTile); key < seen.end; key += kKeyTile) {
        const Operands<W> t(visible, first, rows, key, key - keys.begin, 0, head_dim, b);
        for_panels(t.tile, [&](int64_t panel) {
          panel_p(t, panel, g, b);
          panel_dp(t, panel, g, false, b);
        });
      }
      set_delta_from_sums(rows, b);
      for (int64_t i = 0; i < rows; ++i) g.delta.at(s.batch, head, s.q_start + first + i) = b.delta[i];
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
