// The CPU kernels: each works on `count` consecutive elements. Compiled once per instruction set.
#pragma once

#include <cstdint>

#include "../schedule.h"

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

struct Kernels {
  const char* instruction_set;
  void (*radam_f32)(const RadamArgs<float>&);
  void (*radam_f64)(const RadamArgs<double>&);
  void (*lookahead_f32)(const LookaheadArgs<float>&);
  void (*lookahead_f64)(const LookaheadArgs<double>&);
};

inline void radam(const Kernels& k, const RadamArgs<float>& args) { k.radam_f32(args); }
inline void radam(const Kernels& k, const RadamArgs<double>& args) { k.radam_f64(args); }
inline void lookahead(const Kernels& k, const LookaheadArgs<float>& args) { k.lookahead_f32(args); }
inline void lookahead(const Kernels& k, const LookaheadArgs<double>& args) {
  k.lookahead_f64(args);
}

// The kernels for the widest instruction set that this processor has and this binary was built for.
const Kernels& kernels();

}  // namespace ranger::cpu
