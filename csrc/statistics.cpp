#include "statistics.h"

#include <algorithm>

#include "run_all.h"
#include "visibility.h"

namespace atman {
namespace {

// How many chosen rows stand `low` to `high` positions after each own key.
void count_rows(const Statistics& p, int32_t* counts) {
  for (int64_t i = 0; i < p.n_seq; ++i) {
    const Sequence& s = p.sequences[i];
    std::vector<int32_t> before(static_cast<size_t>(s.q_length) + 1, 0);
    for (int64_t row = 0; row < s.q_length; ++row)
      before[static_cast<size_t>(row + 1)] =
          before[static_cast<size_t>(row)] + static_cast<int32_t>(p.is_chosen(s.batch, s.q_start + row));
    const int64_t shift = static_cast<int64_t>(s.k_length) - s.q_length;
    const auto rows_before = [&](int64_t row) {
      return before[static_cast<size_t>(std::clamp<int64_t>(row, 0, s.q_length))];
    };
    for (int64_t key = 0; key < s.k_length; ++key)
      counts[s.batch * p.stride_count + s.k_start + key] =
          rows_before(key + p.high - shift + 1) - rows_before(key + p.low - shift);
  }
}

// The mean over the chosen rows of each sequence; 0 where there is none.
void average_rows(const Statistics& p, float* distance) {
  for (int64_t i = 0; i < p.n_seq; ++i) {
    const Sequence& s = p.sequences[i];
    for (int64_t head = 0; head < p.heads_q; ++head) {
      double sum = 0.0;
      int64_t count = 0;
      for (int64_t row = s.q_start; row < s.q_start + s.q_length; ++row) {
        if (!p.is_chosen(s.batch, row)) continue;
        sum += p.row_sums.at(s.batch, head, row);
        ++count;
      }
      distance[i * p.heads_q + head] = count == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(count));
    }
  }
}

}  // namespace

void attention_statistics(Statistics p, const Scalars& windowed, float* distance, int32_t* counts, int64_t window,
                          const Kernels& kernels, int threads) {
  count_rows(p, counts);
  p.received_count = counts;
  const int64_t attention_window = p.window;
  const auto split = split_lse(p, kernels, threads);
  if (distance != nullptr) {
    const auto row_sums = allocate<float>(static_cast<size_t>(p.batches * p.heads_q * p.rows));
    p.row_sums = {row_sums.get(), p.heads_q * p.rows, p.rows, 1};
    p.near = false;
    run_all(p, kernels.row_statistics, row_tasks(p, threads), threads);
    average_rows(p, distance);
  }
  p.row_sums = windowed;
  p.near = true;
  p.window = std::min(window, attention_window);
  run_all(p, kernels.row_statistics, row_tasks(p, threads), threads);

  // Tasks are cut as if the horizon were the window, which is what they cost.
  p.window = p.high + 1;
  const std::vector<Task> tasks = key_tasks(p, threads);
  p.window = attention_window;
  run_all(p, kernels.column_statistics, tasks, threads);
}

}  // namespace atman
