// What one call computes: plain data shared by the binding, the scheduler and the kernels of every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

// These types are used from files compiled for different instruction sets, so their functions must not be emitted as
// symbols that the linker merges.
#define ATMAN_SHARED [[gnu::always_inline]] inline

namespace atman {

enum class Dtype : int { f32, f16, bf16 };

// A (batch, row, head, head_dim) tensor; strides in elements, the last one is 1.
struct Tensor {
  void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_row = 0;
  int64_t stride_head = 0;

  template <class T>
  ATMAN_SHARED T* at(int64_t batch, int64_t row, int64_t head) const {
    return static_cast<T*>(data) + batch * stride_batch + row * stride_row + head * stride_head;
  }
  ATMAN_SHARED explicit operator bool() const { return data != nullptr; }
};

// A (batch, row) or (batch, head, row) float tensor; strides in elements.
struct Scalars {
  float* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_row = 0;

  ATMAN_SHARED float& at(int64_t batch, int64_t head, int64_t row) const {
    return data[batch * stride_batch + head * stride_head + row * stride_row];
  }
  ATMAN_SHARED explicit operator bool() const { return data != nullptr; }
};

// One row of the sequence table of atman_kernels/plan.py.
struct Sequence {
  int32_t batch, q_start, q_length, k_start, k_length, prefix_start, prefix_length;
};

// The window that hides nothing: NO_WINDOW of atman_kernels/problem.py. No sequence is as long.
constexpr int64_t kNoWindow = int64_t{1} << 30;

// Keys per tile. Tiles lie at multiples of it, so that a row's result does not depend on the split into tasks.
constexpr int64_t kKeyTile = 128;
// Rounded to fp32, an lse up to this moves the p of its row by at most 2^-19, as much as a score of its size does. Of rows
// with a larger one, p is normalised by their own sum again (see split_lse).
constexpr float kLargestLse = 64.0f;
// A backward block that sees at most this many tiles keeps p and dp of all of them, and so has
// delta = sum_v p dp / sum_v p at no cost.
constexpr int64_t kKeptTiles = 4;

struct Problem {
  Dtype dtype;
  int64_t batches, rows, keys;
  int64_t head_dim, heads_q, heads_kv;
  Tensor q, k, v, prefix_k, prefix_v;
  Scalars key_bias;
  const Sequence* sequences;
  int64_t n_seq;
  float sm_scale;
  bool causal;
  int64_t window;

  ATMAN_SHARED int64_t group() const { return heads_q / heads_kv; }
};

// lse = highest + log_sum, of which the sum alone rounds log_sum away where highest is large.
struct SplitLse {
  Scalars highest, log_sum;
};

// Outputs without data are not computed.
struct Forward : Problem {
  Tensor o;
  Scalars lse;
  SplitLse split;
  // Where given, sum_v p d of each row over the distance d back to a key; of causal attention.
  Scalars distance;
};

struct Backward : Problem {
  Tensor d_o, o;
  Scalars lse, dlse;
  // With data where a row's lse is too large.
  SplitLse split;
  // Where given, row terms computed beforehand; otherwise delta = sum_d do o.
  Scalars delta;
  // Gradients that are not asked for have no data.
  Tensor dq, dk, dv;
  bool need_dkey_bias;
};

// Statistics of the attention map p = exp(scores - lse): of rows, sum_v p d over the distance d back to a key, or, with
// `near`, sum_v p min(d, window); of own keys, the mean p over the chosen rows `low` to `high` positions later.
struct Statistics : Problem {
  Scalars lse;
  SplitLse split;
  // Nonzero where a row is chosen; without data all are.
  const uint8_t* rows_chosen;
  int64_t stride_chosen;
  // Whether the row sums are those of min(d, window); the window is then that of the distance.
  bool near;
  int64_t low, high;
  // Outputs: per row and head; per own key and head; per own key, in the layout of `received` without its heads.
  Scalars row_sums, received;
  const int32_t* received_count;
  int64_t stride_count;

  ATMAN_SHARED bool is_chosen(int64_t batch, int64_t row) const {
    return rows_chosen == nullptr || rows_chosen[batch * stride_chosen + row] != 0;
  }
};

// Rows [row_begin, row_end) and keys [key_begin, key_end) of one sequence and key/value head, for all heads of its
// group. Keys count through the prefix: key 0 is the first prefix key.
struct Task {
  int32_t sequence;
  int32_t head_kv;
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;
  // Where a backward task leaves what other tasks add to, or null: (keys of the sequence,), (group, rows, head_dim).
  float* dkey_bias = nullptr;
  float* dq_partial = nullptr;
};

// Hands out aligned pieces of one block; without a block it only counts the bytes.
class Arena {
 public:
  static constexpr size_t kAlignment = 64;

  ATMAN_SHARED explicit Arena(std::byte* block = nullptr) : block_(block) {}

  template <class T>
  ATMAN_SHARED T* take(int64_t count) {
    std::byte* piece = block_ == nullptr ? nullptr : block_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(piece);
  }
  ATMAN_SHARED size_t used() const { return used_; }

 private:
  std::byte* block_;
  size_t used_ = 0;
};

// Whether p of a row with this lse needs its split; not where the row has no key.
ATMAN_SHARED bool needs_split(float lse) {
  const float size = lse < 0.0f ? -lse : lse;
  return size > kLargestLse && size < __builtin_inff();
}

// The entry points that each instruction set provides. Without `run` the arena only counts what the task would take.
struct Kernels {
  void (*forward)(const Forward&, const Task&, Arena&, bool run);
  void (*delta)(const Backward&, const Task&, Arena&, bool run);
  void (*backward)(const Backward&, const Task&, Arena&, bool run);
  // dq of a sequence and key/value head = the sum of `count` partial results.
  void (*sum_dq)(const Backward&, const Task&, const float* partials, int64_t count);
  void (*row_statistics)(const Statistics&, const Task&, Arena&, bool run);
  void (*column_statistics)(const Statistics&, const Task&, Arena&, bool run);
};

}  // namespace atman
