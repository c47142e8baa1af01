// Which keys a row sees. Positions count through the prefix: key 0 is the first prefix key, row 0 has position
// P + Tk - Tq.
#pragma once

#include "problem.h"

namespace atman {

struct Range {
  int64_t begin, end;
  ATMAN_SHARED bool empty() const { return begin >= end; }
};

struct Visibility {
  int64_t n_keys;
  int64_t n_rows;
  int64_t shift;
  int64_t window;
  bool causal;

  ATMAN_SHARED Visibility(const Problem& problem, const Sequence& sequence)
      : n_keys(static_cast<int64_t>(sequence.prefix_length) + sequence.k_length),
        n_rows(sequence.q_length),
        shift(n_keys - n_rows),
        window(problem.window),
        causal(problem.causal) {}

  // Keys that at least one of the rows [first, last] sees; exact for a single row.
  ATMAN_SHARED Range keys(int64_t first, int64_t last) const {
    if (!causal) return {0, n_keys};
    const int64_t end = clamp(last + shift + 1, n_keys);
    const int64_t begin = clamp(first + shift - window + 1, n_keys);
    return {begin, end};
  }

  // Rows that see at least one of the keys [first, last]; exact for a single key.
  ATMAN_SHARED Range rows(int64_t first, int64_t last) const {
    if (!causal) return {0, n_rows};
    const int64_t begin = clamp(first - shift, n_rows);
    const int64_t end = clamp(last - shift + window, n_rows);
    return {begin, end};
  }

  // Whether every row of [first, last] sees every key of `keys`.
  ATMAN_SHARED bool all(int64_t first, int64_t last, Range tile) const {
    const Range a = keys(first, first), b = keys(last, last);
    return a.begin <= tile.begin && b.begin <= tile.begin && a.end >= tile.end && b.end >= tile.end;
  }

 private:
  ATMAN_SHARED static int64_t clamp(int64_t x, int64_t high) { return x < 0 ? 0 : x > high ? high : x; }
};

}  // namespace atman
