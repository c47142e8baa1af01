// One forward or backward call: tasks, scratch memory, threads, and the sums over tasks.
#pragma once

#include <new>
#include <string>

#include "problem.h"

namespace atman {

// Derives from bad_alloc so that Python sees a MemoryError.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(size_t bytes)
      : message_("attention needs " + std::to_string(bytes) + " bytes of scratch memory, which could not be had") {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

void attention_forward(const Forward& f, const Kernels& kernels, int threads);

// Writes the gradients that have data; dkey_bias may be empty.
void attention_backward(Backward g, const Scalars& dkey_bias, const Kernels& kernels, int threads);

}  // namespace atman
