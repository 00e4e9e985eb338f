// How numbers are stored: the codecs that formats are made of, around a rule that sees float32 or
// float64 values only. Integer operations on the bits of a float32, additions and the root: the
// same bits anywhere. ranger_cuda/state/codecs.py is the same in Python, and says why.
#pragma once

#include <type_traits>

#include "numbers.h"

namespace ranger {

// Elements that share a scale, side by side in a parameter's row-major order.
constexpr int kGroup = 32;

// Nothing is stored beside the stream itself.
struct NoRest {};

// A codec is what one element is in memory, in the stream's tensor and in another beside it, and
// what there is between memory and the rule. Where it is random, `random` has 16 random bits.
template <typename T>
struct Plain {
  using Stored = T;
  using Rest = NoRest;
  static constexpr bool kIsRandom = false, kIsGrouped = false;

  template <typename Value>
  static RANGER_HOST_DEVICE Value decode(T stored, NoRest = {}) {
    return static_cast<Value>(widened(stored));
  }
  template <typename Value>
  static RANGER_HOST_DEVICE void encode(Value value, uint32_t, T& stored, NoRest&) {
    if constexpr (sizeof(T) >= sizeof(Value)) {
      stored = value;
    } else {
      stored = narrowed<T>(value);
    }
  }
};

RANGER_HOST_DEVICE BFloat16 upper_half(uint32_t bits, bool nan) {
  return {static_cast<uint16_t>(nan ? 0x7fc0 : bits >> 16)};
}

struct StochasticBFloat16 {
  using Stored = BFloat16;
  using Rest = NoRest;
  static constexpr bool kIsRandom = true, kIsGrouped = false;

  template <typename Value>
  static RANGER_HOST_DEVICE float decode(BFloat16 stored, NoRest) {
    return widened(stored);
  }
  static RANGER_HOST_DEVICE void encode(float value, uint32_t random, BFloat16& stored, NoRest&) {
    const uint32_t bits = bits_of(value);
    stored = upper_half(is_finite(bits) ? bits + random : bits, is_nan(bits));
  }
};

// The float32 of a bfloat16 and what its rounding took, a signed number of last places. Where
// others have written to the bfloat16 since, nothing is nearer to 0 than 0, or beyond infinity.
RANGER_HOST_DEVICE float joined(BFloat16 high, int32_t low) {
  const uint32_t bits = static_cast<uint32_t>(high.bits) << 16;
  const uint32_t magnitude = bits & kMagnitude;
  low = magnitude == 0 && low < 0 ? 0 : low;
  low = magnitude == kInfinity && low > 0 ? 0 : low;
  return value_of(bits + static_cast<uint32_t>(low));
}

// The residual's 16 bits lie in a bfloat16 tensor: collectives carry no 16-bit integers.
struct Split {
  using Stored = BFloat16;
  using Rest = BFloat16;
  static constexpr bool kIsRandom = false, kIsGrouped = false;

  template <typename Value>
  static RANGER_HOST_DEVICE float decode(BFloat16 stored, BFloat16 rest) {
    return joined(stored, static_cast<int16_t>(rest.bits));
  }
  static RANGER_HOST_DEVICE void encode(float value, uint32_t, BFloat16& stored, BFloat16& rest) {
    const uint32_t bits = bits_of(value);
    const bool nan = is_nan(bits);
    stored = upper_half(bits + 0x8000, nan);  // ties away from zero: the rest fits 16 bits
    rest.bits = static_cast<uint16_t>(nan ? 0 : bits);
  }
};

struct Split24 {
  using Stored = BFloat16;
  using Rest = int8_t;
  static constexpr bool kIsRandom = true, kIsGrouped = false;

  template <typename Value>
  static RANGER_HOST_DEVICE float decode(BFloat16 stored, int8_t rest) {
    return joined(stored, static_cast<int32_t>(rest) * 256);
  }
  static RANGER_HOST_DEVICE void encode(float value, uint32_t random, BFloat16& stored,
                                        int8_t& rest) {
    const uint32_t bits = bits_of(value);
    const bool nan = is_nan(bits);
    const uint32_t rounded = is_finite(bits) ? bits + (random >> 8) : bits;
    stored = upper_half((rounded & ~0xffu) + 0x8000, nan);
    rest = static_cast<int8_t>(nan ? 0 : rounded >> 8 & 0xff);
  }
};

// The magnitude of `value` in a smaller type, rounded stochastically: exponent, then fraction.
// `least`: the bits of the type's smallest normal number, a power of two. Its exponent becomes 1;
// below it lie fixed-point numbers, which adding it makes of them. Of the fraction, `dropped` bits
// are dropped, and `random` has as many.
RANGER_HOST_DEVICE uint32_t shortened(float value, uint32_t least, int dropped, uint32_t random) {
  const uint32_t magnitude = bits_of(value) & kMagnitude;
  const uint32_t fixed = bits_of(value_of(magnitude) + value_of(least)) - least;
  const uint32_t normal = magnitude - least + (1u << 23);
  return ((magnitude < least ? fixed : normal) + random) >> dropped;
}

struct StochasticFloat16 {
  using Stored = Float16;
  using Rest = NoRest;
  static constexpr bool kIsRandom = true, kIsGrouped = false;

  template <typename Value>
  static RANGER_HOST_DEVICE float decode(Float16 stored, NoRest) {
    return widened(stored);
  }
  static RANGER_HOST_DEVICE void encode(float value, uint32_t random, Float16& stored, NoRest&) {
    const uint32_t bits = bits_of(value);
    uint32_t narrow = shortened(value, 0x38800000, 13, random >> 3);
    narrow = is_finite(bits) && narrow < 0x7c00 ? narrow : 0x7c00;
    narrow = is_nan(bits) ? 0x7e00 : narrow;
    stored = {static_cast<uint16_t>(narrow | (bits >> 16 & 0x8000))};
  }
};

// A float32 beside the float16 that it is rounded to. Where others have written to that since, it
// counts as it is.
struct Master {
  using Stored = Float16;
  using Rest = float;
  static constexpr bool kIsRandom = false, kIsGrouped = false;

  template <typename Value>
  static RANGER_HOST_DEVICE float decode(Float16 stored, float rest) {
    const float value = widened(stored);
    return widened(narrowed<Float16>(rest)) == value ? rest : value;
  }
  static RANGER_HOST_DEVICE void encode(float value, uint32_t, Float16& stored, float& rest) {
    stored = narrowed<Float16>(value);
    rest = value;
  }
};

// --- small floats of which a group shares a power of two -----------------------------------------

// 3 bits of exponent, 0 for fixed-point numbers, and kFraction of fraction. The largest of a group
// has the exponent 6. A scale counts from 0, where 1 in the exponent is float32's smallest normal
// number; kNotFinite, and an element is infinite or NaN.
constexpr uint8_t kNotFinite = 255;

template <int kFraction>
struct Grouped {
  using Stored = uint8_t;
  using Rest = uint8_t;  // the scale, one for a group
  static constexpr bool kIsRandom = true, kIsGrouped = true;
  static constexpr int kDropped = 23 - kFraction;

  // `largest`: of the bits of a group's magnitudes.
  static RANGER_HOST_DEVICE uint8_t scale_of(uint32_t largest) {
    const uint32_t exponent = largest >> 23;
    const uint32_t scale = exponent < 6 ? 0 : exponent - 6;
    return static_cast<uint8_t>(largest >= kInfinity ? kNotFinite : scale);
  }
  // 16 random bits, and a half of their last.
  static RANGER_HOST_DEVICE uint32_t code_of(float value, uint8_t scale, uint32_t random) {
    constexpr int kLowest = kDropped - 16;
    return shortened(value, (scale + 1u) << 23, kDropped,
                     (random << kLowest) + (1u << (kLowest - 1)));
  }
  static RANGER_HOST_DEVICE float magnitude_of(uint32_t code, uint8_t scale) {
    const uint32_t bits = code << kDropped;
    const uint32_t least = (scale + 1u) << 23;
    const float fixed = value_of(bits + least) - value_of(least);
    const float normal = value_of(bits + (static_cast<uint32_t>(scale) << 23));
    return code < 1u << kFraction ? fixed : normal;
  }
};

// A sign, and 4 bits of fraction. Beside an infinity or NaN all else is 0.
struct GroupedSigned : Grouped<4> {
  template <typename Value>
  static RANGER_HOST_DEVICE float decode(uint8_t stored, uint8_t scale) {
    const uint32_t code = stored & 0x7f;
    const uint32_t other = code == 0 ? 0 : code == 1 ? kInfinity : kInfinity + 1;
    const uint32_t bits = scale == kNotFinite ? other : bits_of(magnitude_of(code, scale));
    return value_of(bits | static_cast<uint32_t>(stored & 0x80) << 24);
  }
  // What is coded of a value.
  static RANGER_HOST_DEVICE float coded(float value) { return value; }
  static RANGER_HOST_DEVICE uint8_t encode(float value, uint32_t random, uint8_t scale) {
    const uint32_t bits = bits_of(value);
    const uint32_t other = is_finite(bits) ? 0 : is_nan(bits) ? 2 : 1;
    const uint32_t code = scale == kNotFinite ? other : code_of(value, scale, random);
    return static_cast<uint8_t>(code | (bits >> 24 & 0x80));
  }
};

// The root of a number from 0 on, and 5 bits of fraction; above 0 it stays there. Beside an
// infinity or NaN all else above 0 is 2^126.
struct GroupedRoot : Grouped<5> {
  template <typename Value>
  static RANGER_HOST_DEVICE float decode(uint8_t code, uint8_t scale) {
    const uint32_t other = code == 0   ? 0
                           : code == 1 ? bits_of(0x1p63f)
                           : code == 2 ? kInfinity
                                       : kInfinity + 1;
    const float root = scale == kNotFinite ? value_of(other) : magnitude_of(code, scale);
    return root * root;
  }
  static RANGER_HOST_DEVICE float coded(float value) { return square_root(value); }
  static RANGER_HOST_DEVICE uint8_t encode(float root, uint32_t random, uint8_t scale) {
    const uint32_t bits = bits_of(root);
    const uint32_t other = is_finite(bits) ? 1 : is_nan(bits) ? 3 : 2;
    uint32_t code = scale == kNotFinite ? other : code_of(root, scale, random);
    code = code == 0 ? 1 : code;
    return static_cast<uint8_t>((bits & kMagnitude) == 0 ? 0 : code);
  }
};

// --- by name
// ---------------------------------------------------------------------------------------

// As ranger_cuda/state/formats.py calls them. Slow24 is what Split24 is, in tensors of other names.
#define RANGER_CODECS(X)                    \
  X(Float32, Plain<float>)                  \
  X(Float64, Plain<double>)                 \
  X(BFloat16, Plain<ranger::BFloat16>)      \
  X(Float16, Plain<ranger::Float16>)        \
  X(StochasticBFloat16, StochasticBFloat16) \
  X(StochasticFloat16, StochasticFloat16)   \
  X(Split, Split)                           \
  X(Split24, Split24)                       \
  X(Master, Master)                         \
  X(GroupedSigned, GroupedSigned)           \
  X(GroupedRoot, GroupedRoot)

enum class CodecId : int8_t {
#define RANGER_ENUMERATOR(name, type) k##name,
  RANGER_CODECS(RANGER_ENUMERATOR)
#undef RANGER_ENUMERATOR
      kCount
};
constexpr int kCodecs = static_cast<int>(CodecId::kCount);

template <class Codec>
constexpr CodecId kCodecOf = CodecId::kCount;
#define RANGER_CODEC_OF(name, type) \
  template <>                       \
  inline constexpr CodecId kCodecOf<type> = CodecId::k##name;
RANGER_CODECS(RANGER_CODEC_OF)
#undef RANGER_CODEC_OF

struct CodecInfo {
  const char* name;
  DType stored;
  DType rest;  // kCount: there is none
  bool is_random;
  bool is_grouped;

  constexpr bool counts_elements() const { return is_random || is_grouped; }
  constexpr bool has_rest() const { return rest != DType::kCount; }
};
constexpr CodecInfo kCodecInfos[] = {
#define RANGER_CODEC_INFO(name, type)                                                      \
  {#name, kDTypeOf<typename type::Stored>, kDTypeOf<typename type::Rest>, type::kIsRandom, \
   type::kIsGrouped},
    RANGER_CODECS(RANGER_CODEC_INFO)
#undef RANGER_CODEC_INFO
};

constexpr const CodecInfo& info_of(CodecId codec) { return kCodecInfos[static_cast<int>(codec)]; }

}  // namespace ranger
