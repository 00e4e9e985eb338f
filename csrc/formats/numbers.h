// Numbers as they lie in memory, and their values.
#pragma once

#include <cstdint>
#include <cstring>

#include "../rule/portable.h"

namespace ranger {

// Bits of a number that no arithmetic here sees.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Gradients are of the first kGradDTypes.
#define RANGER_DTYPES(X)            \
  X(Float32, float, "float32")      \
  X(Float64, double, "float64")     \
  X(BFloat16, BFloat16, "bfloat16") \
  X(Float16, Float16, "float16")    \
  X(Int8, int8_t, "int8")           \
  X(UInt8, uint8_t, "uint8")

enum class DType : int8_t {
#define RANGER_ENUMERATOR(name, type, text) k##name,
  RANGER_DTYPES(RANGER_ENUMERATOR)
#undef RANGER_ENUMERATOR
      kCount
};
constexpr int kGradDTypes = static_cast<int>(DType::kInt8);

template <typename T>
constexpr DType kDTypeOf = DType::kCount;
#define RANGER_DTYPE_OF(name, type, text) \
  template <>                             \
  inline constexpr DType kDTypeOf<type> = DType::k##name;
RANGER_DTYPES(RANGER_DTYPE_OF)
#undef RANGER_DTYPE_OF

struct DTypeInfo {
  const char* name;  // of torch's
  int64_t item_size;
};
constexpr DTypeInfo kDTypeInfos[] = {
#define RANGER_DTYPE_INFO(name, type, text) {text, sizeof(type)},
    RANGER_DTYPES(RANGER_DTYPE_INFO)
#undef RANGER_DTYPE_INFO
};

constexpr const DTypeInfo& info_of(DType dtype) { return kDTypeInfos[static_cast<int>(dtype)]; }

// Calls `run` with a value of a gradient's type.
template <class Run>
RANGER_HOST_DEVICE decltype(auto) by_grad_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat64:
      return run(double());
    case DType::kBFloat16:
      return run(BFloat16());
    case DType::kFloat16:
      return run(Float16());
    default:
      return run(float());
  }
}

template <typename To, typename From>
RANGER_HOST_DEVICE To with_bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
RANGER_HOST_DEVICE uint32_t bits_of(float x) { return with_bits_of<uint32_t>(x); }
RANGER_HOST_DEVICE float value_of(uint32_t bits) { return with_bits_of<float>(bits); }

constexpr uint32_t kInfinity = 0x7f800000;   // a float32's bits
constexpr uint32_t kMagnitude = 0x7fffffff;  // all of them but the sign

// The uppermost byte of each word, the first word's lowest.
RANGER_HOST_DEVICE uint32_t upper_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(__byte_perm(a, b, 0x0073), __byte_perm(c, d, 0x0073), 0x5410);
#else
  return a >> 24 | b >> 24 << 8 | c >> 24 << 16 | d >> 24 << 24;
#endif
}

RANGER_HOST_DEVICE bool is_finite(uint32_t bits) { return (bits & kMagnitude) < kInfinity; }
RANGER_HOST_DEVICE bool is_nan(float x) { return x != x; }

// --- exact where they are widened, rounded to nearest where they are narrowed --------------------

RANGER_HOST_DEVICE float widened(float x) { return x; }
RANGER_HOST_DEVICE double widened(double x) { return x; }
RANGER_HOST_DEVICE float widened(BFloat16 x) {
  return value_of(static_cast<uint32_t>(x.bits) << 16);
}
RANGER_HOST_DEVICE float widened(Float16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  // Exponent and fraction in float32's place, where the exponent's bias is 112 more; below the
  // smallest normal number, whose exponent is 1, lie fixed-point ones.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  constexpr uint32_t kLeast = 113u << 23;
  const uint32_t fixed = bits_of(value_of(magnitude + kLeast) - value_of(kLeast));
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t value = magnitude < 1u << 23 ? fixed : normal;
  return value_of((magnitude < 0x0f800000 ? value : magnitude | kInfinity) | sign);
#endif
}

template <typename T>
RANGER_HOST_DEVICE T narrowed(float x);
template <>
RANGER_HOST_DEVICE float narrowed<float>(float x) {
  return x;
}
template <>
RANGER_HOST_DEVICE BFloat16 narrowed<BFloat16>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>(is_nan(x) ? 0x7fc0 : rounded)};
}
template <>
RANGER_HOST_DEVICE Float16 narrowed<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  Float16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  return narrow;
#else
  // Adding a number rounds to its last place: a half, and to even, as float16 does.
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & kMagnitude;
  const uint32_t fixed = bits_of(value_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t narrow = magnitude < 0x38800000 ? fixed : normal;
  narrow = narrow > 0x7c00 ? 0x7c00 : narrow;
  narrow = magnitude > kInfinity ? 0x7e00 : magnitude == kInfinity ? 0x7c00 : narrow;
  return {static_cast<uint16_t>(narrow | (bits >> 16 & 0x8000))};
#endif
}

}  // namespace ranger
