#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace ranger::cpu {

extern const Kernels kernels_baseline;
#if defined(RANGER_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

// RANGER_CUDA_CPU_CAPABILITY caps the choice, to try a narrower set on a processor with more.
bool allowed(const char* instruction_set) {
  static constexpr const char* kNarrowToWide[] = {"baseline", "avx2", "avx512"};
  const char* cap = std::getenv("RANGER_CUDA_CPU_CAPABILITY");
  if (cap == nullptr) return true;
  for (const char* name : kNarrowToWide) {
    if (std::strcmp(name, instruction_set) == 0) return true;
    if (std::strcmp(name, cap) == 0) return false;
  }
  return true;
}

const Kernels& choose() {
#if defined(RANGER_X86)
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw")) {
    return kernels_avx512;
  }
  if (allowed("avx2") && __builtin_cpu_supports("avx2")) return kernels_avx2;
#endif
  return kernels_baseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace ranger::cpu
