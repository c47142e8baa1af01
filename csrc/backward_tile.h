// What a block of query rows and one tile of keys contribute to the gradients.
#pragma once

#include "scores.h"

namespace atman::ATMAN_ISA {

constexpr int64_t kBackwardRows = 96;
// In place of a log_sum, which is at least 0.
constexpr float kWhole = -1.0f;

template <class W>
struct BackwardBuffers {
  W *k_panels, *v_panels, *k_rows;
  float *bias, *dkey_bias;
  // Accumulators of the tiles that hold keys of the sequence itself; a prefix gets no gradient.
  float *dk, *dv;
  float* dq;
  // The rows of a block as left operands, and as right ones of the products over rows.
  W *q, *d_o, *q_deep, *do_deep;
  // p or ds of one tile as an operand.
  W* scores;
  // Per kept tile: rows x kKeyTile.
  float *p, *ds;
  // Per row: p = exp(score - lse), or exp((score - lse) - log_sum) where the lse is split; log_sum is kWhole elsewhere.
  float *lse, *log_sum, *delta;
  // Per row and lane: sums of p dp and of p. Per row: what makes its p sum to 1.
  float *row_sums, *p_sums, *norm;
  // The only key that a row sees, or kManyKeys.
  int64_t* only_key;
  int32_t* kept_before;
  int64_t tile_size;
  static constexpr bool kDeepIsPlain = Word<W>::kNumbers == 1;

  BackwardBuffers(Arena& arena, const Backward& g, int64_t keys, int64_t own_keys, int64_t rows, int64_t all_keys) {
    const int64_t padded = padded_head_dim(g.head_dim), padded_rows = rows + kRowPadding;
    const int64_t tiles = minimum<int64_t>(round_up(keys, kKeyTile) / kKeyTile, kKeptTiles);
    tile_size = padded_rows * kKeyTile;
    k_panels = arena.take<W>(keys * words<W>(g.head_dim));
    v_panels = arena.take<W>(keys * words<W>(g.head_dim));
    k_rows = arena.take<W>(g.dq ? words<W>(keys) * padded : 0);
    bias = arena.take<float>(keys);
    dkey_bias = arena.take<float>(keys);
    dk = arena.take<float>(g.dk ? (own_keys + kRowPadding) * padded : 0);
    dv = arena.take<float>(g.dv ? (own_keys + kRowPadding) * padded : 0);
    q = arena.take<W>(padded_rows * padded_words<W>(g.head_dim));
    d_o = arena.take<W>(padded_rows * padded_words<W>(g.head_dim));
    q_deep = kDeepIsPlain ? q : arena.take<W>(g.dk ? words<W>(padded_rows) * padded : 0);
    do_deep = kDeepIsPlain ? d_o : arena.take<W>(g.dv ? words<W>(padded_rows) * padded : 0);
    scores = arena.take<W>(scratch_words<W>(padded_rows));
    dq = arena.take<float>(g.dq ? padded_rows * padded : 0);
    p = arena.take<float>(tiles * tile_size + kRowPadding);
    ds = arena.take<float>(tiles * tile_size + kRowPadding);
    lse = arena.take<float>(padded_rows);
    log_sum = arena.take<float>(padded_rows);
    delta = arena.take<float>(padded_rows);
    row_sums = arena.take<float>(padded_rows * kLanes);
    p_sums = arena.take<float>(padded_rows * kLanes);
    norm = arena.take<float>(padded_rows);
    only_key = arena.take<int64_t>(rows);
    kept_before = arena.take<int32_t>(g.key_bias ? all_keys + 1 : 0);
  }
};

// Query rows of one head, packed, with what the backward needs to know of each.
template <class T, class W>
void load_block(const Backward& g, const Sequence& s, const Visibility& visible, int64_t head, int64_t first,
                int64_t rows, const BackwardBuffers<W>& b) {
  const auto q_row = [&](int64_t row) { return g.q.at<const T>(s.batch, s.q_start + row, head); };
  const auto do_row = [&](int64_t row) { return g.d_o.at<const T>(s.batch, s.q_start + row, head); };
  pack_rows<T>(q_row, {first, first + rows}, kRowPadding, g.head_dim, b.q);
  pack_rows<T>(do_row, {first, first + rows}, kRowPadding, g.head_dim, b.d_o);
  if constexpr (!BackwardBuffers<W>::kDeepIsPlain) {
    if (g.dk) pack_deep_rows<T>(q_row, {first, first + rows}, kRowPadding, g.head_dim, b.q_deep);
    if (g.dv) pack_deep_rows<T>(do_row, {first, first + rows}, kRowPadding, g.head_dim, b.do_deep);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float lse = g.lse.at(s.batch, head, s.q_start + first + i);
    b.only_key[i] = only_key(visible.keys(first + i, first + i), g.key_bias ? b.kept_before : nullptr);
    // A row without a key gets p = e^-inf = 0; a row with a single one too, until set_only_keys.
    b.lse[i] = lse == -kInfinity || b.only_key[i] != kManyKeys ? kInfinity : lse;
    b.log_sum[i] = kWhole;
    if (g.split.highest && needs_split(b.lse[i])) {
      b.lse[i] = g.split.highest.at(s.batch, head, s.q_start + first + i);
      b.log_sum[i] = g.split.log_sum.at(s.batch, head, s.q_start + first + i);
    }
  }
  for (int64_t i = rows; i < rows + kRowPadding; ++i) b.lse[i] = kInfinity, b.log_sum[i] = kWhole, b.delta[i] = 0.0f;
}

// delta of each row where p and dp of the whole row are not at hand.
template <class T, class W>
void load_delta(const Backward& g, const Sequence& s, int64_t head, int64_t first, int64_t rows,
                const BackwardBuffers<W>& b) {
  const int64_t padded = padded_words<W>(g.head_dim);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = s.q_start + first + i;
    if (g.delta) {
      b.delta[i] = g.delta.at(s.batch, head, row);
      continue;
    }
    const T* o = g.o.at<const T>(s.batch, row, head);
    Vec sum = zero();
    for (int64_t d = 0, at = i * padded; d < g.head_dim; d += kLanes * Word<W>::kNumbers, at += kLanes)
      sum = Word<W>::multiply_add(load(b.d_o + at), Word<W>::load_first(o + d, g.head_dim - d), sum);
    b.delta[i] = sum_lanes(sum);
  }
}

// ds = p (dp - delta + dlse): the gradient of lse only shifts the row's term.
template <class W>
void subtract_dlse(const Backward& g, const Sequence& s, int64_t head, int64_t first, int64_t rows,
                   const BackwardBuffers<W>& b) {
  if (!g.dlse) return;
  for (int64_t i = 0; i < rows; ++i) b.delta[i] -= g.dlse.at(s.batch, head, s.q_start + first + i);
}

// One tile with its operands: keys count from the task's first, p and ds lie at `kept`.
template <class W>
struct Operands {
  Tile tile;
  const W *k_panels, *v_panels;
  const float* bias;
  float *dkey_bias, *p, *ds;

  Operands(const Visibility& visible, int64_t first_row, int64_t rows, int64_t key, int64_t at, int64_t kept,
           int64_t head_dim, const BackwardBuffers<W>& b)
      : tile{visible, first_row, rows, key},
        k_panels(b.k_panels + at * words<W>(head_dim)),
        v_panels(b.v_panels + at * words<W>(head_dim)),
        bias(b.bias + at),
        dkey_bias(b.dkey_bias + at),
        p(b.p + kept * b.tile_size),
        ds(b.ds + kept * b.tile_size) {}
};

// p of one panel, 0 where a row does not see the key.
template <class W>
void panel_p(const Operands<W>& t, int64_t panel, const Backward& g, const BackwardBuffers<W>& b) {
  const Vec scale = broadcast(g.sm_scale);
  const bool edge = t.tile.has_edge();
  multiply_panel(t.tile, panel, b.q, padded_words<W>(g.head_dim), t.k_panels + panel * kPanel * words<W>(g.head_dim),
                 g.head_dim, [&](auto mr, auto nv, int64_t row, int64_t vector, const auto& acc) {
                   for (int j = 0; j < nv; ++j) {
                     const Vec bias = load(t.bias + (vector + j) * kLanes);
                     float* p = t.p + row * kTileRow + (vector + j) * kLanes;
                     for (int i = 0; i < mr; ++i) {
                       const Vec lse = broadcast(b.lse[row + i]);
                       // The score as the forward rounds it, where its sum is used.
                       const Vec x = b.log_sum[row + i] == kWhole
                                         ? fma(acc[i][j], scale, sub(bias, lse))
                                         : sub(sub(fma(acc[i][j], scale, bias), lse), broadcast(b.log_sum[row + i]));
                       store(p + i * kTileRow, exp(x));
                     }
                   }
                   if (edge) hide_edges(t.tile, row, {vector, vector + nv}, 0.0f, t.p);
                 });
}

// Adds p dp and p of one panel to the row's sums; with `keep` also stores dp where ds belongs.
template <class W>
void panel_dp(const Operands<W>& t, int64_t panel, const Backward& g, bool keep, const BackwardBuffers<W>& b) {
  multiply_panel(t.tile, panel, b.d_o, padded_words<W>(g.head_dim), t.v_panels + panel * kPanel * words<W>(g.head_dim),
                 g.head_dim, [&](auto mr, auto nv, int64_t row, int64_t vector, const auto& acc) {
                   for (int i = 0; i < mr; ++i) {
                     const int64_t at = (row + i) * kTileRow + vector * kLanes;
                     Vec sum = load(b.row_sums + (row + i) * kLanes), p_sum = load(b.p_sums + (row + i) * kLanes);
                     for (int j = 0; j < nv; ++j) {
                       const Vec p = load(t.p + at + j * kLanes);
                       sum = fma(p, acc[i][j], sum);
                       p_sum = add(p_sum, p);
                       if (keep) store(t.ds + at + j * kLanes, acc[i][j]);
                     }
                     store(b.row_sums + (row + i) * kLanes, sum);
                     store(b.p_sums + (row + i) * kLanes, p_sum);
                   }
                 });
}

// ds = p (dp - delta) of one panel; its column sums are added to the key bias gradient.
template <class W>
void panel_ds(const Operands<W>& t, int64_t panel, const Backward& g, bool keep, const BackwardBuffers<W>& b) {
  multiply_panel(t.tile, panel, b.d_o, padded_words<W>(g.head_dim), t.v_panels + panel * kPanel * words<W>(g.head_dim),
                 g.head_dim, [&](auto mr, auto nv, int64_t row, int64_t vector, const auto& acc) {
                   for (int j = 0; j < nv; ++j) {
                     const int64_t column = (vector + j) * kLanes;
                     Vec sum = load(t.dkey_bias + column);
                     for (int i = 0; i < mr; ++i) {
                       const int64_t at = (row + i) * kTileRow + column;
                       const Vec ds = mul(load(t.p + at), sub(acc[i][j], broadcast(b.delta[row + i])));
                       if (keep) store(t.ds + at, ds);
                       sum = add(sum, ds);
                     }
                     store(t.dkey_bias + column, sum);
                   }
                 });
}

// The same from a kept dp, for the whole tile; p is normalised on the way.
template <class W>
void kept_ds(const Operands<W>& t, const BackwardBuffers<W>& b) {
  for (int64_t row = 0; row < t.tile.rows; row += kStrip) {
    const Range vectors = t.tile.strip_vectors(row);
    const int64_t last = minimum<int64_t>(row + kStrip, t.tile.rows);
    for (int64_t j = vectors.begin; j < vectors.end; ++j) {
      Vec sum = load(t.dkey_bias + j * kLanes);
      for (int64_t i = row; i < last; ++i) {
        const int64_t at = i * kTileRow + j * kLanes;
        const Vec p = mul(load(t.p + at), broadcast(b.norm[i]));
        const Vec ds = mul(p, sub(load(t.ds + at), broadcast(b.delta[i])));
        store(t.p + at, p);
        store(t.ds + at, ds);
        sum = add(sum, ds);
      }
      store(t.dkey_bias + j * kLanes, sum);
    }
  }
}

template <class Panel>
ATMAN_INLINE void for_panels(const Tile& tile, Panel panel) {
  const Range all = tile.vectors();
  for (int64_t i = all.begin / kTileVectors; i * kTileVectors < all.end; ++i) panel(i);
}

// The softmax over a single key is the constant 1, so that its ds is the gradient of lse and nothing else. Computed as
// the others are, it would be the rounding of lse.
template <class W>
void set_only_keys(const Operands<W>& t, const Backward& g, const Sequence& s, int64_t head,
                   const BackwardBuffers<W>& b) {
  for (int64_t i = 0; i < t.tile.rows; ++i) {
    const int64_t key = b.only_key[i] - t.tile.first_key;
    if (key < 0 || key >= kKeyTile) continue;
    const float ds = g.dlse ? g.dlse.at(s.batch, head, s.q_start + t.tile.first_row + i) : 0.0f;
    t.p[i * kTileRow + key] = 1.0f;
    t.ds[i * kTileRow + key] = ds;
    t.dkey_bias[key] += ds;
  }
}

// dq, dk and dv of one tile from p and ds; dk and dv start at the tile's first key.
template <class W>
void tile_products(const Operands<W>& t, const Backward& g, const W* k_rows, float* dk, float* dv,
                   const BackwardBuffers<W>& b) {
  const Tile& tile = t.tile;
  const Range all = tile.vectors();
  const int64_t padded = padded_head_dim(g.head_dim);
  if (tile.has_edge()) {
    for (int64_t row = 0; row < tile.rows; row += kStrip) {
      const int64_t rows = minimum<int64_t>(kStrip, tile.rows - row);
      clear_outside(all, tile.strip_vectors(row), row, rows, t.p);
      clear_outside(all, tile.strip_vectors(row), row, rows, t.ds);
    }
  }
  const Range keys{all.begin * kLanes, all.end * kLanes};
  const auto rows_of_keys = [&](int64_t first, int64_t last) { return words<W>(tile.key_rows(first, last)); };
  const auto keys_of_rows = [&](int64_t first, int64_t last) {
    const Range needed = tile.vectors(first, last);
    return words<W>(Range{needed.begin * kLanes, needed.end * kLanes});
  };
  if (dv != nullptr)
    accumulate(over_rows(t.p, tile.rows, all, b.scores), b.do_deep, padded, dv, padded, keys, padded / kLanes, nullptr,
               rows_of_keys);
  if (dk != nullptr)
    accumulate(over_rows(t.ds, tile.rows, all, b.scores), b.q_deep, padded, dk, padded, keys, padded / kLanes, nullptr,
               rows_of_keys);
  if (g.dq)
    accumulate(over_keys(t.ds, tile.rows, all, b.scores), k_rows, padded, b.dq, padded, {0, tile.rows},
               padded / kLanes, nullptr, keys_of_rows);
}

template <class W>
void clear_sums(int64_t rows, const BackwardBuffers<W>& b) {
  fill(b.row_sums, rows * kLanes, 0.0f);
  fill(b.p_sums, rows * kLanes, 0.0f);
}

// delta as the mean of dp. The p of a row sum to 1 up to the rounding of its lse, which is far above that of p where
// scores are large; times dp, it would be all of ds where one key has nearly all the weight.
template <class W>
void set_delta_from_sums(int64_t rows, const BackwardBuffers<W>& b) {
  for (int64_t i = 0; i < rows; ++i) {
    const float p_sum = sum_lanes(load(b.p_sums + i * kLanes));
    b.norm[i] = p_sum == 0.0f ? 0.0f : 1.0f / p_sum;
    b.delta[i] = p_sum == 0.0f ? 0.0f : sum_lanes(load(b.row_sums + i * kLanes)) / p_sum;
  }
}

}  // namespace atman::ATMAN_ISA
