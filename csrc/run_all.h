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
    // The heads of a sequence need the same.
    if (task.head_kv != 0) continue;
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

}  // namespace atman
