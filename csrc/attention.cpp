#include "attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "run_all.h"

namespace atman {
namespace {

// Where the key bias gradients of each sequence lie in a buffer of one row per key/value head.
std::vector<int64_t> own_key_offsets(const Problem& problem) {
  std::vector<int64_t> offsets{0};
  for (int64_t i = 0; i < problem.n_seq; ++i) offsets.push_back(offsets.back() + problem.sequences[i].k_length);
  return offsets;
}

void sum_dkey_bias(const Problem& problem, const Scalars& out, const std::vector<int64_t>& offsets,
                   const float* per_head) {
  for (int64_t i = 0; i < problem.n_seq; ++i) {
    const Sequence& s = problem.sequences[i];
    for (int64_t key = 0; key < s.k_length; ++key) {
      float sum = 0.0f;
      for (int64_t head = 0; head < problem.heads_kv; ++head)
        sum += per_head[head * offsets.back() + offsets[static_cast<size_t>(i)] + key];
      out.at(s.batch, 0, s.k_start + key) = sum;
    }
  }
}

struct SplitHead {
  size_t first_task, count;
  int64_t partial_size, offset;
};

// Sequences and key/value heads whose keys are split over several tasks.
std::vector<SplitHead> split_heads(const Problem& problem, const std::vector<Task>& tasks) {
  std::vector<SplitHead> found;
  int64_t offset = 0;
  for (size_t i = 0, next; i < tasks.size(); i = next) {
    next = i + 1;
    while (next < tasks.size() && tasks[next].sequence == tasks[i].sequence && tasks[next].head_kv == tasks[i].head_kv)
      ++next;
    if (next - i == 1) continue;
    const int64_t size = problem.group() * problem.sequences[tasks[i].sequence].q_length * problem.head_dim;
    found.push_back({i, next - i, size, offset});
    offset += size * static_cast<int64_t>(next - i);
  }
  return found;
}

// Row tasks of the sequences in which some row block cannot keep p and dp of all its keys.
std::vector<Task> delta_tasks(const Backward& g, const std::vector<Task>& key_tasks, int threads) {
  std::vector<bool> needed(static_cast<size_t>(g.n_seq), false);
  for (const Task& task : key_tasks) {
    const Sequence& s = g.sequences[task.sequence];
    const int64_t keys = static_cast<int64_t>(s.prefix_length) + s.k_length;
    if (task.key_end - task.key_begin < keys || keys > kKeptTiles * kKeyTile)
      needed[static_cast<size_t>(task.sequence)] = true;
  }
  std::vector<Task> tasks = row_tasks(g, threads);
  tasks.erase(std::remove_if(tasks.begin(), tasks.end(),
                             [&](const Task& task) { return !needed[static_cast<size_t>(task.sequence)]; }),
              tasks.end());
  return tasks;
}

}  // namespace

void attention_forward(const Forward& f, const Kernels& kernels, int threads) {
  run_all(f, kernels.forward, row_tasks(f, threads), threads);
}

void attention_backward(Backward g, const Scalars& dkey_bias, const Kernels& kernels, int threads) {
  g.need_dkey_bias = static_cast<bool>(dkey_bias);
  const auto split = split_lse(g, kernels, threads);
  std::vector<Task> tasks = key_tasks(g, threads);
  std::unique_ptr<float[], Free> delta;
  if (g.need_dkey_bias && g.dtype != Dtype::f32) {
    const std::vector<Task> row_passes = delta_tasks(g, tasks, threads);
    if (!row_passes.empty()) {
      delta = allocate<float>(static_cast<size_t>(g.batches * g.heads_q * g.rows));
      g.delta = {delta.get(), g.heads_q * g.rows, g.rows, 1};
      run_all(g, kernels.delta, row_passes, threads);
    }
  }

  const std::vector<int64_t> offsets = own_key_offsets(g);
  std::unique_ptr<float[], Free> per_head;
  if (g.need_dkey_bias) {
    per_head = allocate<float>(static_cast<size_t>(g.heads_kv * offsets.back()));
    for (Task& task : tasks)
      task.dkey_bias = per_head.get() + task.head_kv * offsets.back() + offsets[static_cast<size_t>(task.sequence)];
  }
  const std::vector<SplitHead> splits = g.dq ? split_heads(g, tasks) : std::vector<SplitHead>{};
  std::unique_ptr<float[], Free> partials;
  if (!splits.empty()) {
    const SplitHead& last = splits.back();
    partials = allocate<float>(static_cast<size_t>(last.offset) + last.count * static_cast<size_t>(last.partial_size));
    for (const SplitHead& split : splits)
      for (size_t i = 0; i < split.count; ++i)
        tasks[split.first_task + i].dq_partial =
            partials.get() + split.offset + static_cast<int64_t>(i) * split.partial_size;
  }

  run_all(g, kernels.backward, tasks, threads);

  run_tasks(static_cast<int64_t>(splits.size()), threads, [&](int64_t i, int) {
    const SplitHead& split = splits[static_cast<size_t>(i)];
    kernels.sum_dq(g, tasks[split.first_task], partials.get() + split.offset, static_cast<int64_t>(split.count));
  });
  if (g.need_dkey_bias) sum_dkey_bias(g, dkey_bias, offsets, per_head.get());
}

}  // namespace atman
