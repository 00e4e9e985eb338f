// The random bits of stochastic rounding: a counter and a key, hashed; no state, no generator.
//
// The counter is an element's position in its whole parameter, so that a shard's bits are the
// whole's. The key is of the seed, the parameter's place in its optimizer, and the step.
// ranger_cuda/state/random_bits.py is the same in Python.
#pragma once

#include <cstdint>

#include "portable.h"

namespace ranger {

// 64 bits, each of which depends on each of `word`'s. Steele, Lea and Flood, "Fast Splittable
// Pseudorandom Number Generators", OOPSLA 2014; variant 13 of Stafford's, as in SplitMix64.
RANGER_HOST_DEVICE uint64_t mixed(uint64_t word) {
  word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9u;
  word = (word ^ word >> 27) * 0x94d049bb133111ebu;
  return word ^ word >> 31;
}

// Both halves of a 64-bit product, one upon the other.
RANGER_HOST_DEVICE uint32_t folded(uint32_t x, uint32_t factor) {
  const uint64_t product = static_cast<uint64_t>(x) * factor;
  return static_cast<uint32_t>(product >> 32) ^ static_cast<uint32_t>(product);
}

constexpr uint32_t kFirstFactor = 0xd2511f53u;

// A word for each element of a stream, which has the 16 bits of it from `shift` on.
struct RandomBits {
  uint32_t counter, key, factor;
  int32_t shift;

  RANGER_HOST_DEVICE uint32_t word_of(uint32_t position) const {
    return folded(folded(position ^ counter, kFirstFactor) ^ key, factor);
  }
};

// The keys of one parameter in one step.
struct RandomKeys {
  uint32_t counter;  // the counter's
  uint32_t moments;  // of the word that exp_avg takes the upper and exp_avg_sq the lower half of
  uint32_t param;    // of the word that the parameter, and its slow weight, take the upper half of
  uint32_t unused;

  RANGER_HOST_DEVICE RandomBits of_param() const { return {counter, param, 0x9e3779b1u, 16}; }
  RANGER_HOST_DEVICE RandomBits of_exp_avg() const { return {counter, moments, 0xcd9e8d57u, 16}; }
  RANGER_HOST_DEVICE RandomBits of_exp_avg_sq() const { return {counter, moments, 0xcd9e8d57u, 0}; }
};

// `place`: of the parameter, counted through the groups. `pull`: whether it is a pull alone, after
// another optimizer's step of the same count.
RANGER_HOST_DEVICE RandomKeys random_keys(int64_t seed, int64_t place, int64_t step, bool pull) {
  const uint64_t of_param =
      mixed(mixed(static_cast<uint64_t>(seed)) ^ static_cast<uint64_t>(place));
  const uint64_t word = mixed(of_param ^ static_cast<uint64_t>(2 * step + (pull ? 1 : 0)));
  return {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32),
          static_cast<uint32_t>(mixed(word)), 0};
}

}  // namespace ranger
