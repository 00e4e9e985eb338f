// One source for host and device: marks and math that nvcc and the host compilers spell
// differently.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define RANGER_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the kernels are compiled once per instruction set, and a shared out-of-line copy
// could be the one with instructions that this machine lacks.
#define RANGER_HOST_DEVICE inline __attribute__((always_inline))
#endif

// Hints for nvcc. How often to unroll the next loop; without a number, all of it:
#if defined(__CUDA_ARCH__)
#define RANGER_PRAGMA(text) _Pragma(#text)
#define RANGER_UNROLL(times) RANGER_PRAGMA(unroll times)
// An address that was itself loaded could be one of shared memory for all that nvcc knows.
#define RANGER_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#else
#define RANGER_UNROLL(times)
#define RANGER_ASSUME_GLOBAL(pointer)
#endif

namespace ranger {

// Correctly rounded square roots (IEEE 754), on the device too whatever flags it is compiled with.
RANGER_HOST_DEVICE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

RANGER_HOST_DEVICE double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

}  // namespace ranger
