// Compiled once per instruction set, with RANGER_INSTRUCTION_SET naming it (see CMakeLists.txt).
#include "kernels.h"

#include "../rule/radam_lookahead.h"

namespace ranger::cpu {
namespace {

// `kSync` as a template parameter leaves the loop without `slow` where there is none to read. What
// else is the same for a whole chunk the compiler takes out of the loop, which then vectorises.
template <typename T, bool kSync>
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
    if (kSync) x.p = slow[i] = ranger::lookahead(x.p, slow[i], c.alpha);
    p[i] = x.p;
    m[i] = x.m;
    v[i] = x.v;
  }
}

template <typename T>
void radam_chunk(const RadamArgs<T>& args) {
  args.sync ? radam_loop<T, true>(args) : radam_loop<T, false>(args);
}

template <typename T>
void lookahead_chunk(const LookaheadArgs<T>& args) {
  T* __restrict__ p = args.p;
  T* __restrict__ slow = args.slow;
  const T alpha = args.alpha;
  for (int64_t i = 0; i < args.count; ++i) {
    p[i] = slow[i] = ranger::lookahead(p[i], slow[i], alpha);
  }
}

template <typename T, typename Stored>
void decode(const void* stored, T* values, int64_t count) {
  const auto* __restrict__ from = static_cast<const Stored*>(stored);
  for (int64_t i = 0; i < count; ++i) values[i] = Plain<Stored>::template decode<T>(from[i]);
}

template <typename T, typename Stored>
void encode(const T* values, void* stored, int64_t count) {
  auto* __restrict__ to = static_cast<Stored*>(stored);
  for (int64_t i = 0; i < count; ++i) to[i] = Plain<Stored>::encode(values[i]);
}

// In the order of RANGER_DTYPES. Nothing is stored in 16 bits yet.
template <typename T>
constexpr KernelsOf<T> kKernelsOf = {
    radam_chunk<T>,
    lookahead_chunk<T>,
    {decode<T, float>, decode<T, double>, decode<T, BFloat16>, decode<T, Float16>},
    {encode<T, float>, encode<T, double>, nullptr, nullptr}};

}  // namespace

#define RANGER_CONCATENATE(a, b) a##b
#define RANGER_TABLE(set) RANGER_CONCATENATE(kernels_, set)
#define RANGER_STRING(set) #set
#define RANGER_NAME(set) RANGER_STRING(set)

extern const Kernels RANGER_TABLE(RANGER_INSTRUCTION_SET);
const Kernels RANGER_TABLE(RANGER_INSTRUCTION_SET) = {RANGER_NAME(RANGER_INSTRUCTION_SET),
                                                      kKernelsOf<float>, kKernelsOf<double>};

}  // namespace ranger::cpu
