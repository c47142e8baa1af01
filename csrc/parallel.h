// Runs independent tasks on the threads that PyTorch already has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace atman {

// Calls body(task, worker) once for every task in [0, tasks), from at most `threads` threads; worker < threads.
// Tasks start in order.
void run_tasks(int64_t tasks, int threads, const std::function<void(int64_t task, int worker)>& body);

}  // namespace atman
