// Scratch memory, and a call's tasks run on threads with scratch memory each.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention.h"
#include "parallel.h"
#include "schedule.h"

namespace atman {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
std::unique_ptr<T[], Free> allocate(size_t count) {
  const size_t bytes = (count * sizeof(T) + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
  void* block = std::aligned_alloc(Arena::kAlignment, std::max(bytes, Arena::kAlignment));
  if (block == nullptr) throw OutOfMemory(bytes);
  return std::unique_ptr<T[], Free>(static_cast<T*>(block));
}

// Runs the tasks, each with scratch memory of its thread.
template <class Call, class Entry>
void run_all(const Call& call, Entry entry, const std::vector<Task>& tasks, int threads) {
  if (tasks.empty()) return;
  size_t bytes = 0;
  for (const Task& task : tasks) {
    Arena counting;
    entry(call, task, counting, false);
    bytes = std::max(bytes, counting.used());
  }
  const int workers = static_cast<int>(std::min<int64_t>(threads, static_cast<int64_t>(tasks.size())));
  const auto scratch = allocate<std::byte>(bytes * static_cast<size_t>(workers));
  const auto run = [&](const Task& task, int worker) {
    Arena arena(scratch.get() + bytes * static_cast<size_t>(worker));
    entry(call, task, arena, true);
  };
  if (workers == 1) {
    for (const Task& task : tasks) run(task, 0);
    return;
  }
  const std::vector<int32_t> order = largest_first(call, tasks);
  run_tasks(static_cast<int64_t>(tasks.size()), workers,
            [&](int64_t i, int worker) { run(tasks[static_cast<size_t>(order[static_cast<size_t>(i)])], worker); });
}

// Computes and sets `call.split` where a row needs it: one product of queries and keys more for the tasks with such a
// row. Returns what holds it.
template <class Call>
std::unique_ptr<float[], Free> split_lse(Call& call, const Kernels& kernels, int threads) {
  std::vector<Task> tasks = row_tasks(call, threads);
  const auto is_plain = [&](const Task& task) {
    const Sequence& s = call.sequences[task.sequence];
    for (int64_t head = task.head_kv * call.group(); head < (task.head_kv + 1) * call.group(); ++head) {
      for (int64_t row = s.q_start + task.row_begin; row < s.q_start + task.row_end; ++row)
        if (needs_split(call.lse.at(s.batch, head, row))) return false;
    }
    return true;
  };
  tasks.erase(std::remove_if(tasks.begin(), tasks.end(), is_plain), tasks.end());
  if (tasks.empty()) return nullptr;
  const int64_t count = call.batches * call.heads_q * call.rows;
  auto values = allocate<float>(static_cast<size_t>(2 * count));
  const Scalars highest{values.get(), call.heads_q * call.rows, call.rows, 1};
  const Scalars log_sum{values.get() + count, call.heads_q * call.rows, call.rows, 1};
  call.split = {highest, log_sum};
  Forward f{};
  static_cast<Problem&>(f) = call;
  f.split = call.split;
  run_all(f, kernels.forward, tasks, threads);
  return values;
}

}  // namespace atman
