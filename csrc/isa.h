// Which instruction sets this build has and this processor runs.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "problem.h"

namespace atman {

struct Isa {
  std::string_view name;
  const Kernels* kernels;
  const Kernels* bf16_kernels;
};

// Best first; never empty.
const std::vector<Isa>& available_isas();

// The kernels called `name`, or the best for "", for tensors of `dtype`. Throws std::invalid_argument.
const Kernels& kernels_for(std::string_view name, Dtype dtype);

}  // namespace atman
