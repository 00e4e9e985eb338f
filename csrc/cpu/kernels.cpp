// Compiled once per instruction set, with RANGER_INSTRUCTION_SET naming it (see CMakeLists.txt).
#include "kernels.h"

#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../rule/radam_lookahead.h"

namespace ranger::cpu {
namespace {

// `kSync` as a template parameter leaves the loop without `slow` where there is none to read, and
// `kRoot` has v's root in place of v, for codecs that store it. What else is the same for a whole
// chunk the compiler takes out of the loop, which then vectorises.
template <typename T, bool kSync, bool kRoot>
void radam_loop(const RadamArgs<T>& args) {
  const Coefficients<T> c = args.c;
  const bool l2 = c.weight_decay != T(0), rectified = args.rectified;
  T* __restrict__ p = args.p;
  const T* __restrict__ g = args.g;
  T* __restrict__ m = args.m;
  T* __restrict__ v = args.v;
  T* __restrict__ slow = args.slow;
  for (int64_t i = 0; i < args.count; ++i) {
    Element<T> x = ranger::radam(Element<T>{p[i], m[i], v[i]}, g[i], c, l2, rectified);
    if (kSync) x.p = ranger::lookahead(x.p, slow[i], c.alpha);
    p[i] = ranger::bounded(x.p, c);
    if (kSync) slow[i] = p[i];
    m[i] = x.m;
    v[i] = kRoot ? x.root : x.v;
  }
}

template <typename T>
void radam_chunk(const RadamArgs<T>& args) {
  if (args.root) {
    args.sync ? radam_loop<T, true, true>(args) : radam_loop<T, false, true>(args);
  } else {
    args.sync ? radam_loop<T, true, false>(args) : radam_loop<T, false, false>(args);
  }
}

template <typename T, bool kOuter>
void lookahead_loop(const LookaheadArgs<T>& args) {
  const Coefficients<T> c = args.c;
  T* __restrict__ p = args.p;
  T* __restrict__ slow = args.slow;
  T* __restrict__ b = args.b;
  for (int64_t i = 0; i < args.count; ++i) {
    const T pulled = kOuter ? ranger::outer_step(p[i], slow[i], b[i], c)
                            : ranger::lookahead(p[i], slow[i], c.alpha);
    p[i] = slow[i] = ranger::bounded(pulled, c);
  }
}

template <typename T>
void lookahead_chunk(const LookaheadArgs<T>& args) {
  args.b != nullptr ? lookahead_loop<T, true>(args) : lookahead_loop<T, false>(args);
}

// In lanes, in a fixed order whatever the instruction set.
template <typename T>
double squares(const T* gradients, int64_t count) {
  constexpr int kLanes = 16;
  double sums[kLanes] = {};
  int64_t first = 0;
  for (; first + kLanes <= count; first += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double g = gradients[first + lane];
      sums[lane] += g * g;
    }
  }
  for (; first < count; ++first) sums[0] += double{gradients[first]} * double{gradients[first]};
  for (int lane = 1; lane < kLanes; ++lane) sums[0] += sums[lane];
  return sums[0];
}

template <typename T>
void add_to_lanes(const T* __restrict__ gradients, int64_t count, T* __restrict__ sums) {
  int64_t first = 0;
  for (; first + kLanes <= count; first += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += gradients[first + lane];
  }
  for (int lane = 0; first + lane < count; ++lane) sums[lane] += gradients[first + lane];
}

template <typename T, typename Grad>
void widen(const void* gradients, T* __restrict__ values, int64_t count) {
  const auto* __restrict__ from = static_cast<const Grad*>(gradients);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(widened(from[i]));
}

// Calls `run` with the first element of each group, and how many it has: mostly a constant, for
// which loops are vectorised.
template <class Run>
void for_each_group(int64_t count, const Run& run) {
  int64_t first = 0;
  for (; first + kGroup <= count; first += kGroup) {
    run(first, std::integral_constant<int, kGroup>());
  }
  if (first < count) run(first, static_cast<int>(count - first));
}

template <typename T, class Codec>
void decode(const Stored& from, T* __restrict__ values) {
  using Rest = typename Codec::Rest;
  const auto* __restrict__ stored = static_cast<const typename Codec::Stored*>(from.elements);
  const auto* __restrict__ rest = static_cast<const Rest*>(from.rest);
  if constexpr (Codec::kIsGrouped) {
    for_each_group(from.count, [&](int64_t first, auto count) {
      by_scale(rest[first / kGroup], [&](const auto& times) {
        for (int i = 0; i < count; ++i) {
          values[first + i] = Codec::decode(uint32_t{stored[first + i]} << 24, times);
        }
      });
    });
  } else {
    for (int64_t i = 0; i < from.count; ++i) {
      Rest beside = {};
      if constexpr (!std::is_same_v<Rest, NoRest>) beside = rest[i];
      values[i] = Codec::template decode<T>(stored[i], beside);
    }
  }
}

// A group at a time, to arrays that nothing else can be: what is stored may be bytes, which could
// be anything for all that a compiler knows.
template <typename T, class Codec>
void encode(const T* values, const Stored& to, const uint32_t* words, int shift) {
  using Element = typename Codec::Stored;
  using Rest = typename Codec::Rest;
  for_each_group(to.count, [&](int64_t first, auto count) {
    Element stored[kGroup];
    Rest rest[kGroup];
    const auto random = [&](int i) {
      return Codec::kIsRandom ? Random16{words[first + i], shift} : Random16();
    };
    if constexpr (Codec::kIsGrouped) {
      uint32_t largest = 0;
      for (int i = 0; i < count; ++i) {
        const uint32_t magnitude = Codec::magnitude_of(values[first + i]);
        largest = magnitude > largest ? magnitude : largest;
      }
      const uint8_t scale = scale_of(largest);
      by_scale(scale, [&](const auto& times) {
        for (int i = 0; i < count; ++i) {
          stored[i] = Codec::encode(values[first + i], random(i), times) >> 24;
        }
      });
      static_cast<Rest*>(to.rest)[first / kGroup] = scale;
    } else {
      for (int i = 0; i < count; ++i) {
        Codec::encode(values[first + i], random(i), stored[i], rest[i]);
      }
      if constexpr (!std::is_same_v<Rest, NoRest>) {
        std::memcpy(static_cast<Rest*>(to.rest) + first, rest, count * sizeof(Rest));
      }
    }
    std::memcpy(static_cast<Element*>(to.elements) + first, stored, count * sizeof(Element));
  });
}

// float64 values are stored as such only.
template <typename T, class Codec>
constexpr bool kIsOf = std::is_same_v<T, double> == std::is_same_v<typename Codec::Stored, double>;

template <typename T, class Codec>
constexpr auto decoder() -> void (*)(const Stored&, T*) {
  if constexpr (kIsOf<T, Codec>) return decode<T, Codec>;
  return nullptr;
}
template <typename T, class Codec>
constexpr auto encoder() -> void (*)(const T*, const Stored&, const uint32_t*, int) {
  if constexpr (kIsOf<T, Codec>) return encode<T, Codec>;
  return nullptr;
}

#define RANGER_DECODER(name, type) decoder<T, type>(),
#define RANGER_ENCODER(name, type) encoder<T, type>(),
template <typename T>
constexpr KernelsOf<T> kKernelsOf = {
    radam_chunk<T>,
    lookahead_chunk<T>,
    squares<T>,
    add_to_lanes<T>,
    {widen<T, float>, widen<T, double>, widen<T, BFloat16>, widen<T, Float16>},
    {RANGER_CODECS(RANGER_DECODER)},
    {RANGER_CODECS(RANGER_ENCODER)}};

void random_words(const RandomBits& random, uint32_t position, uint32_t* words, int64_t count) {
  int64_t i = 0;
#if defined(__AVX2__)
  // What compilers make of a product of 64 bits is a fourth as fast as eight at a time by hand:
  // those at even places where they are, those at odd ones a place lower.
  const auto all = [](uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); };
  const __m256i first = all(kFirstFactor), second = all(random.factor);
  const __m256i counter = all(random.counter), key = all(random.key);
  __m256i places = _mm256_add_epi32(all(position), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const auto folded = [](__m256i x) { return _mm256_xor_si256(x, _mm256_srli_epi64(x, 32)); };
  const auto word = [&](__m256i x) {
    const __m256i once = folded(_mm256_mul_epu32(x, first));
    return folded(_mm256_mul_epu32(_mm256_xor_si256(once, key), second));
  };
  for (; i + 8 <= count; i += 8, places = _mm256_add_epi32(places, all(8))) {
    const __m256i x = _mm256_xor_si256(places, counter);
    const __m256i even = word(x), odd = _mm256_slli_epi64(word(_mm256_srli_epi64(x, 32)), 32);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i), _mm256_blend_epi32(even, odd, 0xaa));
  }
#endif
  for (; i < count; ++i) words[i] = random.word_of(position + static_cast<uint32_t>(i));
}

}  // namespace

#define RANGER_CONCATENATE(a, b) a##b
#define RANGER_TABLE(set) RANGER_CONCATENATE(kernels_, set)
#define RANGER_STRING(set) #set
#define RANGER_NAME(set) RANGER_STRING(set)

extern const Kernels RANGER_TABLE(RANGER_INSTRUCTION_SET);
const Kernels RANGER_TABLE(RANGER_INSTRUCTION_SET) = {
    RANGER_NAME(RANGER_INSTRUCTION_SET), kKernelsOf<float>, kKernelsOf<double>, random_words};

}  // namespace ranger::cpu
