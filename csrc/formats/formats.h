// How a parameter and its state are stored. A row of RANGER_FORMATS is all that a format is:
// kernels, launches, checks and what Python reads are made of the table.
// ranger_cuda/state/formats.py has the same rows.
#pragma once

#include "codecs.h"

namespace ranger {

// The tensors that belong to one parameter: its streams, and beside each the rest of it, if its
// codec has one.
enum Stream : int { kParam, kGrad, kExpAvg, kExpAvgSq, kSlowParam, kOuterMomentumBuffer, kStreams };
constexpr int kRestOf = kStreams;  // kRestOf + kParam: the rest of the parameter, and so on
constexpr int kTensors = 2 * kStreams;

// A slow weight is a snapshot of its parameter, in the parameter's own storage where that is its
// value.
template <class Param>
struct SnapshotOf {
  using Codec = std::conditional_t<Param::kIsRandom, Param, Plain<float>>;
};
template <>
struct SnapshotOf<Plain<double>> {
  using Codec = Plain<double>;
};

// What a format is to the kernels. `kPackWidth` neighbouring elements are loaded at a time.
template <typename Value_, class Param_, class ExpAvg_, class ExpAvgSq_, int kPackWidth_>
struct Format {
  using Value = Value_;
  using Param = Param_;
  using ExpAvg = ExpAvg_;
  using ExpAvgSq = ExpAvgSq_;
  using SlowParam = typename SnapshotOf<Param>::Codec;
  using OuterMomentumBuffer = Plain<Value>;
  static constexpr int kPackWidth = kPackWidth_;
};

// Name, the arithmetic's type, codecs of param, exp_avg and exp_avg_sq, pack width. Gradients are
// of any type, whatever the format.
// clang-format off
#define RANGER_FORMATS(X) \
  X(Float32, "float32", float, Plain<float>, Plain<float>, Plain<float>, 4) \
  X(BFloat16Exact, "bfloat16_exact", float, Split, Plain<float>, Plain<float>, 8) \
  X(BFloat16Stochastic24, "bfloat16_stochastic24", float, Split24, Plain<float>, Plain<float>, 8) \
  X(BFloat16Stochastic, "bfloat16_stochastic", float, StochasticBFloat16, Plain<float>, Plain<float>, 8) \
  X(BFloat16Nearest, "bfloat16_nearest", float, Plain<BFloat16>, Plain<float>, Plain<float>, 8) \
  X(Float16Exact, "float16_exact", float, Master, Plain<float>, Plain<float>, 8) \
  X(Float16Stochastic, "float16_stochastic", float, StochasticFloat16, Plain<float>, Plain<float>, 8) \
  X(Float16Nearest, "float16_nearest", float, Plain<Float16>, Plain<float>, Plain<float>, 8) \
  X(Float32AndBFloat16, "float32_bfloat16", float, Plain<float>, StochasticBFloat16, StochasticBFloat16, 8) \
  X(BFloat16ExactAndBFloat16, "bfloat16_exact_bfloat16", float, Split, StochasticBFloat16, StochasticBFloat16, 8) \
  X(BFloat16Stochastic24AndBFloat16, "bfloat16_stochastic24_bfloat16", float, Split24, StochasticBFloat16, StochasticBFloat16, 8) \
  X(BFloat16StochasticAndBFloat16, "bfloat16_stochastic_bfloat16", float, StochasticBFloat16, StochasticBFloat16, StochasticBFloat16, 8) \
  X(BFloat16NearestAndBFloat16, "bfloat16_nearest_bfloat16", float, Plain<BFloat16>, StochasticBFloat16, StochasticBFloat16, 8) \
  X(Float16ExactAndBFloat16, "float16_exact_bfloat16", float, Master, StochasticBFloat16, StochasticBFloat16, 8) \
  X(Float16StochasticAndBFloat16, "float16_stochastic_bfloat16", float, StochasticFloat16, StochasticBFloat16, StochasticBFloat16, 8) \
  X(Float16NearestAndBFloat16, "float16_nearest_bfloat16", float, Plain<Float16>, StochasticBFloat16, StochasticBFloat16, 8) \
  X(Float32And8Bit, "float32_8bit", float, Plain<float>, GroupedSigned, GroupedRoot, 8) \
  X(BFloat16ExactAnd8Bit, "bfloat16_exact_8bit", float, Split, GroupedSigned, GroupedRoot, 8) \
  X(BFloat16Stochastic24And8Bit, "bfloat16_stochastic24_8bit", float, Split24, GroupedSigned, GroupedRoot, 8) \
  X(BFloat16StochasticAnd8Bit, "bfloat16_stochastic_8bit", float, StochasticBFloat16, GroupedSigned, GroupedRoot, 8) \
  X(BFloat16NearestAnd8Bit, "bfloat16_nearest_8bit", float, Plain<BFloat16>, GroupedSigned, GroupedRoot, 8) \
  X(Float16ExactAnd8Bit, "float16_exact_8bit", float, Master, GroupedSigned, GroupedRoot, 8) \
  X(Float16StochasticAnd8Bit, "float16_stochastic_8bit", float, StochasticFloat16, GroupedSigned, GroupedRoot, 8) \
  X(Float16NearestAnd8Bit, "float16_nearest_8bit", float, Plain<Float16>, GroupedSigned, GroupedRoot, 8) \
  X(Float64, "float64", double, Plain<double>, Plain<double>, Plain<double>, 2)
// clang-format on

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
  CodecId codecs[kStreams];  // kGrad: not the format's to say

  constexpr bool counts_elements() const {
    bool counts = false;
    for (int stream = 0; stream < kStreams; ++stream) {
      counts = counts || (stream != kGrad && info_of(codecs[stream]).counts_elements());
    }
    return counts;
  }
};

template <class F>
constexpr FormatInfo format_info(const char* name) {
  return {name,
          kDTypeOf<typename F::Value>,
          {kCodecOf<typename F::Param>, CodecId::kCount, kCodecOf<typename F::ExpAvg>,
           kCodecOf<typename F::ExpAvgSq>, kCodecOf<typename F::SlowParam>,
           kCodecOf<typename F::OuterMomentumBuffer>}};
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
