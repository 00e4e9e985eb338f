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

// The 16 random bits of a word that begin at `shift`, which is 0 or 16.
struct Random16 {
  uint32_t word;
  int shift;

  RANGER_HOST_DEVICE uint32_t bits() const { return word >> shift & 0xffff; }
};

// A codec is what one element is in memory, in the stream's tensor and in another beside it, and
// what there is between memory and the rule.
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
  static RANGER_HOST_DEVICE void encode(Value value, Random16, T& stored, NoRest&) {
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
  static RANGER_HOST_DEVICE void encode(float value, Random16 random, BFloat16& stored, NoRest&) {
    stored = upper_half(bits_of(value) + random.bits(), is_nan(value));
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
  static RANGER_HOST_DEVICE void encode(float value, Random16, BFloat16& stored, BFloat16& rest) {
    const uint32_t bits = bits_of(value);
    const bool nan = is_nan(value);
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
  static RANGER_HOST_DEVICE void encode(float value, Random16 random, BFloat16& stored,
                                        int8_t& rest) {
    const bool nan = is_nan(value);
    const uint32_t rounded = bits_of(value) + (random.bits() >> 8);
    stored = upper_half((rounded & ~0xffu) + 0x8000, nan);
    rest = static_cast<int8_t>(nan ? 0 : rounded >> 8 & 0xff);
  }
};

// A float32's magnitude as a multiple of a power of two, in float32's bits: 1 in the exponent is
// `least`, the bits of a power of two, and below it lie fixed-point numbers, which adding it makes
// of them.
RANGER_HOST_DEVICE uint32_t in_multiples(uint32_t magnitude, uint32_t least) {
  const uint32_t fixed = bits_of(value_of(magnitude) + value_of(least)) - least;
  return magnitude < least ? fixed : magnitude - least + (1u << 23);
}

struct StochasticFloat16 {
  using Stored = Float16;
  using Rest = NoRest;
  static constexpr bool kIsRandom = true, kIsGrouped = false;

  template <typename Value>
  static RANGER_HOST_DEVICE float decode(Float16 stored, NoRest) {
    return widened(stored);
  }
  static RANGER_HOST_DEVICE void encode(float value, Random16 random, Float16& stored, NoRest&) {
    const uint32_t bits = bits_of(value);
    uint32_t narrow = (in_multiples(bits & kMagnitude, 0x38800000) + (random.bits() >> 3)) >> 13;
    narrow = is_finite(bits) && narrow < 0x7c00 ? narrow : 0x7c00;
    narrow = is_nan(value) ? 0x7e00 : narrow;
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
  static RANGER_HOST_DEVICE void encode(float value, Random16, Float16& stored, float& rest) {
    stored = narrowed<Float16>(value);
    rest = value;
  }
};

// --- small floats of which a group shares a power of two -----------------------------------------

// 3 bits of exponent, 0 for fixed-point numbers, and kFraction of fraction. The largest of a group
// has the exponent 6. A scale counts from 0, where 1 in the exponent is float32's smallest normal
// number; kNotFinite, and an element is infinite or NaN.
constexpr uint8_t kNotFinite = 255;

// `largest`: of the bits of a group's magnitudes.
RANGER_HOST_DEVICE uint8_t scale_of(uint32_t largest) {
  const uint32_t exponent = largest >> 23;
  const uint32_t scale = exponent < 6 ? 0 : exponent - 6;
  return static_cast<uint8_t>(largest >= kInfinity ? kNotFinite : scale);
}

// Between a code, in the place of a float32's upper bits, and a number is 2^scale. Both classes do
// the same.
class Sums {
 public:
  explicit RANGER_HOST_DEVICE Sums(uint8_t scale) : least_((scale + 1u) << 23) {}

  RANGER_HOST_DEVICE float times(uint32_t bits) const {
    const uint32_t magnitude = bits & kMagnitude;
    const float fixed = value_of(magnitude + least_) - value_of(least_);
    const uint32_t normal = magnitude + least_ - (1u << 23);
    return value_of((magnitude < 1u << 23 ? bits_of(fixed) : normal) | (bits & ~kMagnitude));
  }
  RANGER_HOST_DEVICE uint32_t over(uint32_t magnitude) const {
    return in_multiples(magnitude, least_);
  }

 private:
  uint32_t least_;
};

// Where 2^scale and 2^-scale are float32 numbers, which has fixed-point ones itself below its
// normal ones. GPUs are as fast there; other processors mostly are not.
class Products {
 public:
  static constexpr uint8_t kLast = 126;

  explicit RANGER_HOST_DEVICE Products(uint8_t scale)
      : up_(value_of((127u + scale) << 23)), down_(value_of((127u - scale) << 23)) {}

  RANGER_HOST_DEVICE float times(uint32_t bits) const { return value_of(bits) * up_; }
  RANGER_HOST_DEVICE uint32_t over(uint32_t magnitude) const {
    return bits_of(value_of(magnitude) * down_);
  }

 private:
  float up_, down_;
};

struct NotFinite {};

// Calls `run` with what decodes and encodes the numbers of a group.
template <class Run>
RANGER_HOST_DEVICE void by_scale(uint8_t scale, const Run& run) {
#if defined(__CUDA_ARCH__)
  if (scale <= Products::kLast) return run(Products(scale));
#endif
  if (scale == kNotFinite) return run(NotFinite());
  run(Sums(scale));
}

// Codes are in the uppermost byte of a word: what is below them is not looked at in decoding, and
// makes no difference afterwards.
template <int kFraction>
struct Grouped {
  using Stored = uint8_t;
  using Rest = uint8_t;  // the scale, one for a group
  static constexpr bool kIsRandom = true, kIsGrouped = true;

 protected:
  static constexpr int kAbove = kFraction + 1;  // of a float32's bits, the exponent's upper ones

  // 16 random bits, and a half of their last, are added.
  static RANGER_HOST_DEVICE uint32_t rounded(uint32_t bits, Random16 random) {
#if defined(__CUDA_ARCH__)
    const uint32_t more = __byte_perm(random.word, 0x80, random.shift == 0 ? 0x5104 : 0x5324);
#else
    const uint32_t more = random.bits() << 8 | 0x80;
#endif
    return (bits << kAbove) + more;
  }
};

// A sign, and 4 bits of fraction. Beside an infinity or NaN all else is 0.
struct GroupedSigned : Grouped<4> {
  static RANGER_HOST_DEVICE uint32_t magnitude_of(float value) {
    return bits_of(value) & kMagnitude;
  }

  template <class Scale>
  static RANGER_HOST_DEVICE float decode(uint32_t code, const Scale& scale) {
    return scale.times(static_cast<uint32_t>(static_cast<int32_t>(code) >> kAbove) & 0x83f80000);
  }
  static RANGER_HOST_DEVICE float decode(uint32_t code, NotFinite) {
    const uint32_t magnitude = code >> 24 & 0x7f;
    const uint32_t bits = magnitude == 0 ? 0 : magnitude == 1 ? kInfinity : kInfinity + 1;
    return value_of(bits | (code & ~kMagnitude));
  }

  template <class Scale>
  static RANGER_HOST_DEVICE uint32_t encode(float value, Random16 random, const Scale& scale) {
    return rounded(scale.over(magnitude_of(value)), random) | (bits_of(value) & ~kMagnitude);
  }
  static RANGER_HOST_DEVICE uint32_t encode(float value, Random16, NotFinite) {
    const uint32_t bits = bits_of(value);
    if (is_nan(value)) return 2u << 24;  // its sign is nobody's promise
    return (is_finite(bits) ? 0u : 1u) << 24 | (bits & ~kMagnitude);
  }
};

// The root of a number from 0 on, and 5 bits of fraction; above 0 it stays there. Beside an
// infinity or NaN all else above 0 is 2^126. What is encoded is the root already.
struct GroupedRoot : Grouped<5> {
  static constexpr bool kIsRoot = true;

  // No root is below 0; those that are NaN are beyond infinity with a sign, too.
  static RANGER_HOST_DEVICE uint32_t magnitude_of(float root) { return bits_of(root); }

  template <class Scale>
  static RANGER_HOST_DEVICE float decode(uint32_t code, const Scale& scale) {
    const float root = scale.times(code >> kAbove & 0x03fc0000);
    return root * root;
  }
  static RANGER_HOST_DEVICE float decode(uint32_t code, NotFinite) {
    code = code >> 24;
    return value_of(code == 0   ? 0
                    : code == 2 ? kInfinity
                    : code == 3 ? kInfinity + 1
                                : bits_of(0x1p126f));
  }

  template <class Scale>
  static RANGER_HOST_DEVICE uint32_t encode(float root, Random16 random, const Scale& scale) {
    const uint32_t bits = magnitude_of(root);
    const uint32_t code = rounded(scale.over(bits), random);
    const uint32_t least = bits < 1u << 24 ? bits : 1u << 24;  // a root is 0 or far above that
    return code > least ? code : least;
  }
  static RANGER_HOST_DEVICE uint32_t encode(float root, Random16, NotFinite) {
    const uint32_t bits = bits_of(root);
    return bits == 0 ? 0 : (is_finite(bits) ? 1u : is_nan(root) ? 3u : 2u) << 24;
  }
};

// Whether what is encoded is a number's root.
template <class Codec, class = void>
constexpr bool kIsRoot = false;
template <class Codec>
constexpr bool kIsRoot<Codec, std::enable_if_t<Codec::kIsRoot>> = true;

// --- by name -------------------------------------------------------------------------------------

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
  bool is_root;

  constexpr bool counts_elements() const { return is_random || is_grouped; }
  constexpr bool has_rest() const { return rest != DType::kCount; }
};
constexpr CodecInfo kCodecInfos[] = {
#define RANGER_CODEC_INFO(name, type) \
  {#name,                             \
   kDTypeOf<typename type::Stored>,   \
   kDTypeOf<typename type::Rest>,     \
   type::kIsRandom,                   \
   type::kIsGrouped,                  \
   kIsRoot<type>},
    RANGER_CODECS(RANGER_CODEC_INFO)
#undef RANGER_CODEC_INFO
};

constexpr const CodecInfo& info_of(CodecId codec) { return kCodecInfos[static_cast<int>(codec)]; }

}  // namespace ranger
