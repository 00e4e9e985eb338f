// The CPU kernels: each works on `count` consecutive elements. Compiled once per instruction set.
#pragma once

#include <cstdint>

#include "../formats/formats.h"
#include "../rule/schedule.h"

namespace ranger::cpu {

template <typename T>
struct RadamArgs {
  const Coefficients<T>& c;
  bool rectified;
  bool sync;
  int64_t count;
  T* p = nullptr;
  const T* g = nullptr;
  T* m = nullptr;
  T* v = nullptr;
  T* slow = nullptr;  // read and written on a sync step only
};

template <typename T>
struct LookaheadArgs {
  int64_t count;
  T* p;
  T* slow;
  T alpha;
};

// The rule over values of one type, and values from and to what is stored.
template <typename T>
struct KernelsOf {
  void (*radam)(const RadamArgs<T>&);
  void (*lookahead)(const LookaheadArgs<T>&);
  void (*decode[kDTypes])(const void* stored, T* values, int64_t count);
  void (*encode[kDTypes])(const T* values, void* stored, int64_t count);
};

struct Kernels {
  const char* instruction_set;
  KernelsOf<float> f32;
  KernelsOf<double> f64;
};

// The kernels for the widest instruction set that this processor has and this binary was built for.
const Kernels& kernels();

template <typename T>
const KernelsOf<T>& kernels_of();
template <>
inline const KernelsOf<float>& kernels_of() {
  return kernels().f32;
}
template <>
inline const KernelsOf<double>& kernels_of() {
  return kernels().f64;
}

}  // namespace ranger::cpu
