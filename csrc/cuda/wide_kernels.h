// The kernels of formats that are more than a number an element: low-precision parameters and
// moments.
#pragma once

#include "wide_memory.h"

namespace ranger::cuda {

// --- parameters ----------------------------------------------------------------------------------

// Calls `run` with the codec of the row's parameters: float32, or one of those of 16 bits. Which of
// these is a branch, the same for a row: kernels for each would be seven times as many.
struct Float32Parameters {
  using Widest = Plain<float>;
  template <class Run>
  static RANGER_HOST_DEVICE decltype(auto) by_codec(int32_t, const Run& run) {
    return run(Plain<float>());
  }
};

struct LowParameters {
  using Widest = Master;
  template <class Run>
  static RANGER_HOST_DEVICE decltype(auto) by_codec(int32_t codec, const Run& run) {
    switch (static_cast<CodecId>(codec)) {
      case CodecId::kSplit24:
        return run(Split24());
      case CodecId::kStochasticBFloat16:
        return run(StochasticBFloat16());
      case CodecId::kBFloat16:
        return run(Plain<BFloat16>());
      case CodecId::kMaster:
        return run(Master());
      case CodecId::kStochasticFloat16:
        return run(StochasticFloat16());
      case CodecId::kFloat16:
        return run(Plain<Float16>());
      default:
        return run(Split());
    }
  }
};

// As the widest codec has them: which codec it is makes a branch, and all loads come before any
// value is waited for.
template <class Parameters, template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE Fetched<typename Parameters::Widest> fetch_param(const Place<Thread>& at) {
  using Stored = typename Parameters::Widest::Stored;
  Fetched<typename Parameters::Widest> all;
  all.stored = Elements<Stored>(at.row, at.row.data[kParam], kParam, at.begin).load(at.i, at.n);
  Parameters::by_codec(at.row.codec, [&](auto codec) {
    const auto rest = fetch_rest<decltype(codec), Elements>(at, kParam);
    if constexpr (!std::is_same_v<typename decltype(codec)::Rest, NoRest>) {
      std::memcpy(all.rest.words, rest.words, sizeof(rest.words));
    }
  });
  return all;
}

template <class Parameters>
RANGER_HOST_DEVICE Values decode_param(int32_t codec,
                                       const Fetched<typename Parameters::Widest>& all) {
  return Parameters::by_codec(codec, [&](auto its) {
    Fetched<decltype(its)> from;
    std::memcpy(from.stored.words, all.stored.words, sizeof(from.stored.words));
    std::memcpy(from.rest.words, all.rest.words, sizeof(from.rest.words));
    return decode(from);
  });
}

template <class Parameters, template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE Values load_slow(const Place<Thread>& at) {
  return Parameters::by_codec(at.row.codec, [&](auto codec) {
    return decode(fetch<typename SnapshotOf<decltype(codec)>::Codec, Elements>(at, kSlowParam));
  });
}

// Loaded when there are registers to spare, and not with all else.
template <class Parameters, template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE void pull(const Place<Thread>& at, Values& p, const RowScalars& scalars) {
  const Coefficients<float>& c = scalars.f32;
  const Values slow = load_slow<Parameters, Elements>(at);
  if (scalars.flags & kOuter) {
    Values b = decode(fetch<Plain<float>, Elements>(at, kOuterMomentumBuffer));
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) {
      p.values[j] = outer_step(p.values[j], slow.values[j], b.values[j], c);
    }
    store<Plain<float>, Elements>(at, kOuterMomentumBuffer, b, Words(at, {}));
    return;
  }
  RANGER_UNROLL()
  for (int j = 0; j < kPack; ++j) p.values[j] = lookahead(p.values[j], slow.values[j], c.alpha);
}

// `sync`: the slow weight, too, is the same value.
template <class Parameters, template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE void store_param(const Place<Thread>& at, const Values& p, bool sync,
                                    const RandomKeys& keys) {
  const Words random(at, keys.of_param());
  Parameters::by_codec(at.row.codec, [&](auto codec) {
    using Codec = decltype(codec);
    store<Codec, Elements>(at, kParam, p, random);
    if (sync) store<typename SnapshotOf<Codec>::Codec, Elements>(at, kSlowParam, p, random);
  });
}

// --- kernels -------------------------------------------------------------------------------------

// Calls `body` with each place of a block. All threads of a warp call it as often: they tell each
// other of their groups.
template <class Thread, class Body>
RANGER_HOST_DEVICE void for_each_place(const Thread& thread, const DeviceRow& row, const Span& span,
                                       const Body& body) {
  constexpr int kTogether = (kThreads < 32 ? kThreads : 32) * kPack;
  RANGER_UNROLL(1)
  for (int i = thread.index() * kPack; i / kTogether * kTogether < span.count;
       i += kThreads * kPack) {
    body(Place<Thread>{thread, row, span.begin, i, span.count - i});
  }
}

template <class Parameters_, class ExpAvg_, class ExpAvgSq_>
struct WideFormat {
  using Parameters = Parameters_;
  using ExpAvg = ExpAvg_;
  using ExpAvgSq = ExpAvgSq_;
};

template <template <typename> class Elements>
constexpr int kLeastBlocksOfWide = std::is_same_v<Elements<char>, Consecutive<char>> ? 3 : 2;

template <class Format, template <typename> class Elements>
struct WideRadamKernel {
  using Args = StepArgs;
  using Shared = StagedRow;
  static constexpr int kLeastBlocks = kLeastBlocksOfWide<Elements>;

  template <class Thread>
  RANGER_HOST_DEVICE static void run(const Thread& thread, const Args& args, Shared& staged) {
    using Parameters = typename Format::Parameters;
    const ChunkRef chunk = args.tables.chunks[thread.block()];
    stage(thread, args.tables, chunk.row, staged);
    const int64_t flags = staged.scalars.flags;
    if (!(flags & kActive)) return;
    const Coefficients<float>& c = staged.scalars.f32;
    const RandomKeys& keys = staged.scalars.keys;
    const bool l2 = (flags & kL2) != 0, rectified = (flags & kRectified) != 0;
    const bool sync = (flags & kSync) != 0;
    const Span span = span_of(chunk, staged.row.numel);
    for_each_place(thread, staged.row, span, [&](const Place<Thread>& at) {
      const auto fetched_m = fetch<typename Format::ExpAvg, Elements>(at, kExpAvg);
      const auto fetched_v = fetch<typename Format::ExpAvgSq, Elements>(at, kExpAvgSq);
      const auto fetched_p = fetch_param<Parameters, Elements>(at);
      const Values g = load_grad<Elements>(at, staged.scalars.grad);
      Values p = decode_param<Parameters>(staged.row.codec, fetched_p);
      Values m = decode(fetched_m), v = decode(fetched_v);
      RANGER_UNROLL()
      for (int j = 0; j < kPack; ++j) {
        const Element<float> x = radam(Element<float>{p.values[j], m.values[j], v.values[j]},
                                       g.values[j], c, l2, rectified);
        p.values[j] = x.p;
        m.values[j] = x.m;
        v.values[j] = kIsRoot<typename Format::ExpAvgSq> ? x.root : x.v;
      }
      if (sync) pull<Parameters, Elements>(at, p, staged.scalars);
      if (flags & kBounded) {
        RANGER_UNROLL()
        for (int j = 0; j < kPack; ++j) p.values[j] = bounded(p.values[j], c);
      }
      store_param<Parameters, Elements>(at, p, sync, keys);
      Words random(at, keys.of_exp_avg());
      store<typename Format::ExpAvg, Elements>(at, kExpAvg, m, random);
      random.shift = keys.of_exp_avg_sq().shift;  // of the same words
      store<typename Format::ExpAvgSq, Elements>(at, kExpAvgSq, v, random);
    });
  }
};

// The interpolation of 16-bit parameters after another optimizer's step.
template <template <typename> class Elements>
struct LowInterpolationKernel {
  using Args = StepArgs;
  using Shared = StagedRow;
  static constexpr int kLeastBlocks = kLeastBlocksOfWide<Elements>;

  template <class Thread>
  RANGER_HOST_DEVICE static void run(const Thread& thread, const Args& args, Shared& staged) {
    const ChunkRef chunk = args.tables.chunks[thread.block()];
    stage(thread, args.tables, chunk.row, staged);
    if (!Interpolation::applies(staged)) return;
    const Span span = span_of(chunk, staged.row.numel);
    for_each_place(thread, staged.row, span, [&](const Place<Thread>& at) {
      Values p =
          decode_param<LowParameters>(staged.row.codec, fetch_param<LowParameters, Elements>(at));
      pull<LowParameters, Elements>(at, p, staged.scalars);
      store_param<LowParameters, Elements>(at, p, true, staged.scalars.keys);
    });
  }
};

}  // namespace ranger::cuda
