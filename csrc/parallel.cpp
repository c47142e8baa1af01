#include "parallel.h"

#include <atomic>
#include <thread>
#include <vector>

// The entry point of the OpenMP runtime (libgomp, and libomp and libiomp5 under the same name) that PyTorch has loaded.
// Not linked against: a second runtime would bring a second pool of threads, and idle OpenMP threads spin for
// milliseconds on the cores that the other pool needs. Null where no runtime is loaded.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) __attribute__((weak));

namespace atman {
namespace {

struct Region {
  const std::function<void(int64_t, int)>& body;
  int64_t tasks;
  std::atomic<int64_t> next_task{0};
  std::atomic<int> next_worker{0};

  void work() {
    const int worker = next_worker.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      const int64_t task = next_task.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      body(task, worker);
    }
  }
};

}  // namespace

void run_tasks(int64_t tasks, int threads, const std::function<void(int64_t, int)>& body) {
  Region region{body, tasks};
  if (threads <= 1 || tasks <= 1) return region.work();
  const auto work = [](void* data) { static_cast<Region*>(data)->work(); };
  if (GOMP_parallel != nullptr) return GOMP_parallel(work, &region, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, &region);
  region.work();
  for (std::thread& other : others) other.join();
}

}  // namespace atman
