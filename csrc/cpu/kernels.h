// The CPU kernels: each works on `count` consecutive elements. Compiled once per instruction set.
#pragma once

#include <cstdint>

#include "../formats/formats.h"
#include "../rule/random.h"
#include "../rule/schedule.h"

namespace ranger::cpu {

template <typename T>
struct RadamArgs {
  Coefficients<T> c;
  bool rectified;
  bool sync;
  bool root;  // v becomes its root
  int64_t count;
  T* p = nullptr;
  const T* g = nullptr;
  T* m = nullptr;
  T* v = nullptr;
  T* slow = nullptr;  // read and written on a sync step only
};

template <typename T>
struct LookaheadArgs {
  const Coefficients<T>& c;
  int64_t count;
  T* p;
  T* slow;
  T* b;  // outer_momentum_buffer; nullptr: no momentum
};

// Elements of a stream side by side, from the first of a group on.
struct Stored {
  void* elements;
  void* rest;  // of the same; nullptr: there is none
  int64_t count;
};

// The rule over values of one type, and values from and to what is stored.
template <typename T>
struct KernelsOf {
  void (*radam)(const RadamArgs<T>&);
  void (*lookahead)(const LookaheadArgs<T>&);
  double (*squares)(const T* gradients, int64_t count);  // their sum
  // Gradients of a slice, from its first lane on, to the sums of its kLanes.
  void (*add_to_lanes)(const T* gradients, int64_t count, T* sums);
  void (*widen[kGradDTypes])(const void* gradients, T* values, int64_t count);
  void (*decode[kCodecs])(const Stored& from, T* values);
  // `words`: of each element, 16 bits of which from `shift` on are random.
  void (*encode[kCodecs])(const T* values, const Stored& to, const uint32_t* words, int shift);
};

struct Kernels {
  const char* instruction_set;
  KernelsOf<float> f32;
  KernelsOf<double> f64;
  // The words of elements from `position` in the whole parameter on.
  void (*random_words)(const RandomBits& random, uint32_t position, uint32_t* words, int64_t count);
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
