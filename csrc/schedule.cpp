#include "schedule.h"

#include <algorithm>
#include <numeric>

#include "visibility.h"

namespace atman {
namespace {

// Rows per unit of a split: large enough that packing the keys again for the next task hardly counts.
constexpr int64_t kRowUnit = 192;
constexpr int64_t kKeyUnit = kKeyTile;
// Tasks per thread worth splitting for, so that the last ones to finish leave little idle time.
constexpr double kRowTasksPerThread = 3.0;
// Splitting keys costs partial results of dq, so only as far as it takes to occupy the threads.
constexpr double kKeyTasksPerThread = 2.0;

// Visible (row, key) pairs, from the first and last row; every row and key also costs something by itself.
double row_work(const Visibility& visible, int64_t begin, int64_t end) {
  if (begin >= end) return 1.0;
  const Range first = visible.keys(begin, begin), last = visible.keys(end - 1, end - 1);
  const double pairs = 0.5 * static_cast<double>(end - begin) *
                       static_cast<double>(std::max<int64_t>(first.end - first.begin, 0) +
                                           std::max<int64_t>(last.end - last.begin, 0));
  return 1.0 + pairs + 16.0 * static_cast<double>(end - begin);
}

double key_work(const Visibility& visible, int64_t begin, int64_t end) {
  if (begin >= end) return 1.0;
  const Range first = visible.rows(begin, begin), last = visible.rows(end - 1, end - 1);
  const double pairs = 0.5 * static_cast<double>(end - begin) *
                       static_cast<double>(std::max<int64_t>(first.end - first.begin, 0) +
                                           std::max<int64_t>(last.end - last.begin, 0));
  return 1.0 + pairs + 16.0 * static_cast<double>(end - begin);
}

// Boundaries of at most `pieces` pieces of [0, length) with about equal work, at multiples of `unit`.
template <class Work>
std::vector<int64_t> split(int64_t length, int64_t unit, int64_t pieces, Work work) {
  std::vector<int64_t> bounds{0};
  if (pieces > 1) {
    double total = 0.0;
    for (int64_t i = 0; i < length; i += unit) total += work(i, std::min(i + unit, length));
    double done = 0.0;
    for (int64_t i = 0; i + unit < length; i += unit) {
      done += work(i, i + unit);
      if (done >= total * static_cast<double>(bounds.size()) / static_cast<double>(pieces)) bounds.push_back(i + unit);
    }
  }
  bounds.push_back(length);
  return bounds;
}

template <class Length, class Work, class Emit>
void cut(const Problem& problem, int threads, double tasks_per_thread, int64_t unit, Length length, Work work,
         Emit emit) {
  double total = 0.0;
  for (int64_t i = 0; i < problem.n_seq; ++i) {
    const Visibility visible(problem, problem.sequences[i]);
    total += work(visible, 0, length(visible)) * static_cast<double>(problem.heads_kv);
  }
  const double target = total / (tasks_per_thread * threads);
  for (int64_t i = 0; i < problem.n_seq; ++i) {
    const Visibility visible(problem, problem.sequences[i]);
    const double share = work(visible, 0, length(visible)) / target;
    // The small reduction keeps rounding from splitting what exactly fits.
    const int64_t pieces = threads == 1 ? 1 : std::max<int64_t>(1, static_cast<int64_t>(share + 0.999));
    const auto bounds = split(length(visible), unit, pieces,
                              [&](int64_t begin, int64_t end) { return work(visible, begin, end); });
    for (int64_t head = 0; head < problem.heads_kv; ++head)
      for (size_t piece = 0; piece + 1 < bounds.size(); ++piece)
        emit(static_cast<int32_t>(i), static_cast<int32_t>(head), bounds[piece], bounds[piece + 1], visible);
  }
}

}  // namespace

std::vector<Task> row_tasks(const Problem& problem, int threads) {
  std::vector<Task> tasks;
  tasks.reserve(static_cast<size_t>(problem.n_seq * problem.heads_kv));
  cut(problem, threads, kRowTasksPerThread, kRowUnit, [](const Visibility& v) { return v.n_rows; }, row_work,
      [&](int32_t sequence, int32_t head, int64_t begin, int64_t end, const Visibility& visible) {
        if (begin < end) tasks.push_back({sequence, head, begin, end, 0, visible.n_keys});
      });
  return tasks;
}

std::vector<Task> key_tasks(const Problem& problem, int threads) {
  std::vector<Task> tasks;
  tasks.reserve(static_cast<size_t>(problem.n_seq * problem.heads_kv));
  cut(problem, threads, kKeyTasksPerThread, kKeyUnit, [](const Visibility& v) { return v.n_keys; }, key_work,
      [&](int32_t sequence, int32_t head, int64_t begin, int64_t end, const Visibility& visible) {
        tasks.push_back({sequence, head, 0, visible.n_rows, begin, end});
      });
  return tasks;
}

std::vector<int32_t> largest_first(const Problem& problem, const std::vector<Task>& tasks) {
  std::vector<double> work;
  work.reserve(tasks.size());
  for (const Task& task : tasks) {
    const Visibility visible(problem, problem.sequences[task.sequence]);
    const bool whole = task.key_begin == 0 && task.key_end == visible.n_keys;
    work.push_back(whole ? row_work(visible, task.row_begin, task.row_end)
                         : key_work(visible, task.key_begin, task.key_end));
  }
  std::vector<int32_t> order(tasks.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return work[a] > work[b]; });
  return order;
}

}  // namespace atman
