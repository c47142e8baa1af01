// Cuts a call into tasks of similar size, largest first.
#pragma once

#include <vector>

#include "problem.h"

namespace atman {

// Tasks over all rows, each with the heads of one key/value head.
std::vector<Task> row_tasks(const Problem& problem, int threads);

// Tasks over all keys; those of one sequence and key/value head are adjacent and in order of their keys.
std::vector<Task> key_tasks(const Problem& problem, int threads);

// Indices of the tasks, largest work first.
std::vector<int32_t> largest_first(const Problem& problem, const std::vector<Task>& tasks);

}  // namespace atman
