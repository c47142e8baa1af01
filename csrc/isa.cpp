#include "isa.h"

#include <stdexcept>

namespace atman {

#if defined(ATMAN_X86)
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace portable {
extern const Kernels kernels;
}

namespace {

std::vector<Isa> detect() {
  std::vector<Isa> found;
#if defined(ATMAN_X86)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16"))
    found.push_back({"avx512_bf16", &avx512::kernels, &avx512_bf16::kernels});
  if (has_avx512) found.push_back({"avx512", &avx512::kernels, &avx512::kernels});
  if (has_avx2) found.push_back({"avx2", &avx2::kernels, &avx2::kernels});
#endif
  found.push_back({"portable", &portable::kernels, &portable::kernels});
  return found;
}

}  // namespace

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

const Kernels& kernels_for(std::string_view name, Dtype dtype) {
  std::string names;
  for (const Isa& isa : available_isas()) {
    if (name.empty() || isa.name == name) return dtype == Dtype::bf16 ? *isa.bf16_kernels : *isa.kernels;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("no kernels for '" + std::string(name) + "' here; available: " + names);
}

}  // namespace atman
