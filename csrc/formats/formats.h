// How a parameter and its state are stored, around a rule that sees float32 or float64 values only.
// A row of RANGER_FORMATS is all that a format is: kernels, launches, checks and what Python
// reads are made of the table. ranger_cuda/state/formats.py has the same rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "../rule/portable.h"

namespace ranger {

// --- numbers as they lie in memory ---------------------------------------------------------------

// Bits of a number that no arithmetic here sees.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#define RANGER_DTYPES(X)            \
  X(Float32, float, "float32")      \
  X(Float64, double, "float64")     \
  X(BFloat16, BFloat16, "bfloat16") \
  X(Float16, Float16, "float16")

enum class DType : int8_t {
#define RANGER_ENUMERATOR(name, type, text) k##name,
  RANGER_DTYPES(RANGER_ENUMERATOR)
#undef RANGER_ENUMERATOR
      kCount
};
constexpr int kDTypes = static_cast<int>(DType::kCount);

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

// Calls `run` with a value of the type: by_dtype(dtype, [](auto zero) { ... decltype(zero) ... }).
template <class Run>
RANGER_HOST_DEVICE decltype(auto) by_dtype(DType dtype, const Run& run) {
  switch (dtype) {
#define RANGER_CASE(name, type, text) \
  case DType::k##name:                \
    return run(type());
    RANGER_DTYPES(RANGER_CASE)
#undef RANGER_CASE
    default:
      return run(float());  // there is no other
  }
}

template <typename To, typename From>
RANGER_HOST_DEVICE To with_bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// --- values: exact where they are widened, rounded to nearest where they are narrowed ------------

RANGER_HOST_DEVICE float widened(float x) { return x; }
RANGER_HOST_DEVICE double widened(double x) { return x; }
RANGER_HOST_DEVICE float widened(BFloat16 x) {
  return with_bits_of<float>(static_cast<uint32_t>(x.bits) << 16);
}
RANGER_HOST_DEVICE float widened(Float16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  // Exponent and fraction in float32's place, where the exponent's bias is 112 more.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const bool is_finite = magnitude < 0x0f800000;
  const uint32_t finite = with_bits_of<uint32_t>(with_bits_of<float>(magnitude) * 0x1p112f);
  return with_bits_of<float>((is_finite ? finite : magnitude | 0x7f800000) | sign);
#endif
}

// A stream's codec: what one element is in memory, and between memory and the rule.
template <typename T>
struct Plain {
  using Stored = T;
  template <typename Value>
  static RANGER_HOST_DEVICE Value decode(T stored) {
    return static_cast<Value>(widened(stored));
  }
  template <typename Value>
  static RANGER_HOST_DEVICE T encode(Value value) {
    return static_cast<T>(value);
  }
};

// --- the table -----------------------------------------------------------------------------------

// The tensors that belong to one parameter.
enum Stream : int { kParam, kGrad, kExpAvg, kExpAvgSq, kSlowParam, kStreams };

// What a format is to the kernels. `kPackWidth` neighbouring elements are loaded at a time.
template <typename Value_, class Param_, class ExpAvg_, class ExpAvgSq_, class SlowParam_,
          int kPackWidth_>
struct Format {
  using Value = Value_;
  using Param = Param_;
  using ExpAvg = ExpAvg_;
  using ExpAvgSq = ExpAvgSq_;
  using SlowParam = SlowParam_;
  static constexpr int kPackWidth = kPackWidth_;
};

// Name, the arithmetic's type, codecs of param, exp_avg, exp_avg_sq and slow_param, pack width.
// Gradients are of any type, whatever the format.
#define RANGER_FORMATS(X)                                                                 \
  X(Float32, "float32", float, Plain<float>, Plain<float>, Plain<float>, Plain<float>, 4) \
  X(Float64, "float64", double, Plain<double>, Plain<double>, Plain<double>, Plain<double>, 2)

namespace formats {
#define RANGER_STRUCT(name, text, ...) \
  struct name : Format<__VA_ARGS__> {};
RANGER_FORMATS(RANGER_STRUCT)
#undef RANGER_STRUCT
}  // namespace formats

enum class FormatId : int8_t {
#define RANGER_ENUMERATOR(name, ...) k##name,
  RANGER_FORMATS(RANGER_ENUMERATOR)
#undef RANGER_ENUMERATOR
};

struct FormatInfo {
  const char* name;
  DType value;
  DType stored[kStreams];  // kGrad: not the format's to say
};

template <class F>
constexpr FormatInfo format_info(const char* name) {
  return {name,
          kDTypeOf<typename F::Value>,
          {kDTypeOf<typename F::Param::Stored>, DType::kCount, kDTypeOf<typename F::ExpAvg::Stored>,
           kDTypeOf<typename F::ExpAvgSq::Stored>, kDTypeOf<typename F::SlowParam::Stored>}};
}
constexpr FormatInfo kFormatInfos[] = {
#define RANGER_INFO(name, text, ...) format_info<formats::name>(text),
    RANGER_FORMATS(RANGER_INFO)
#undef RANGER_INFO
};

constexpr const FormatInfo& info_of(FormatId format) {
  return kFormatInfos[static_cast<int>(format)];
}

// Calls `run` with a value of the format's struct.
template <class Run>
void by_format(FormatId format, const Run& run) {
  switch (format) {
#define RANGER_CASE(name, ...) \
  case FormatId::k##name:      \
    run(formats::name());      \
    break;
    RANGER_FORMATS(RANGER_CASE)
#undef RANGER_CASE
  }
}

}  // namespace ranger
