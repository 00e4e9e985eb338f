// The kernels of formats that are more than a number an element: low-precision parameters and
// moments. A thread has kPack neighbouring elements at a time, four threads a group.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace ranger::cuda {

constexpr int kPack = 8;

// --- elements as they lie ------------------------------------------------------------------------

// Of the kPack elements of a tensor from element `i` of a block on, `n` are loaded and stored, none
// if it is not positive: side by side, or wherever the row's layout says.
template <typename T>
class Consecutive {
 public:
  RANGER_HOST_DEVICE Consecutive(const DeviceRow&, const void* base, int, int64_t begin)
      : first_(static_cast<T*>(const_cast<void*>(base)) + begin),
        aligned_(reinterpret_cast<uintptr_t>(first_) % 16 == 0) {}

  RANGER_HOST_DEVICE Pack<T, kPack> load(int i, int n) const {
    RANGER_ASSUME_GLOBAL(first_);
    if (aligned_ && n >= kPack) return *reinterpret_cast<const Pack<T, kPack>*>(first_ + i);
    Pack<T, kPack> pack = {};
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) {
      if (j < n) pack.values[j] = first_[i + j];
    }
    return pack;
  }

  RANGER_HOST_DEVICE void store(int i, int n, const Pack<T, kPack>& pack) const {
    RANGER_ASSUME_GLOBAL(first_);
    if (aligned_ && n >= kPack) {
      *reinterpret_cast<Pack<T, kPack>*>(first_ + i) = pack;
      return;
    }
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) {
      if (j < n) first_[i + j] = pack.values[j];
    }
  }

 private:
  T* first_;
  bool aligned_;
};

template <typename T>
class Scattered {
 public:
  RANGER_HOST_DEVICE Scattered(const DeviceRow& row, const void* base, int tensor, int64_t begin)
      : base_(static_cast<T*>(const_cast<void*>(base))),
        layout_(row.layout),
        tensor_(tensor),
        begin_(begin) {}

  RANGER_HOST_DEVICE Pack<T, kPack> load(int i, int n) const {
    RANGER_ASSUME_GLOBAL(base_);
    Pack<T, kPack> pack = {};
    RANGER_UNROLL(1)
    for (int k = 0; k < kPack; ++k) {
      T next = {};
      if (k < n) next = base_[strided_offset(layout_, tensor_, begin_ + i + k)];
      shift(pack);
      pack.values[kPack - 1] = next;
    }
    return pack;
  }

  RANGER_HOST_DEVICE void store(int i, int n, Pack<T, kPack> pack) const {
    RANGER_ASSUME_GLOBAL(base_);
    RANGER_UNROLL(1)
    for (int k = 0; k < kPack; ++k) {
      if (k < n) base_[strided_offset(layout_, tensor_, begin_ + i + k)] = pack.values[0];
      shift(pack);
    }
  }

 private:
  // A loop that is not unrolled cannot index registers.
  static RANGER_HOST_DEVICE void shift(Pack<T, kPack>& pack) {
    RANGER_UNROLL()
    for (int j = 0; j + 1 < kPack; ++j) pack.values[j] = pack.values[j + 1];
  }

  T* base_;
  const int64_t* layout_;
  int tensor_;
  int64_t begin_;
};

// --- values --------------------------------------------------------------------------------------

using Values = Pack<float, kPack>;

// Where a thread is in a row, and the row.
template <class Thread>
struct Place {
  const Thread& thread;
  const DeviceRow& row;
  int64_t begin;  // of the block's elements
  int i;          // of the thread's, from there on
  int n;          // how many of kPack there are, if any

  RANGER_HOST_DEVICE uint32_t position() const {
    return static_cast<uint32_t>(row.first + begin) + static_cast<uint32_t>(i);
  }
};

template <class Codec, template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE Values load(const Place<Thread>& at, int stream) {
  using Stored = typename Codec::Stored;
  using Rest = typename Codec::Rest;
  const void* const beside = at.row.data[kRestOf + stream];
  const Elements<Stored> elements(at.row, at.row.data[stream], stream, at.begin);
  const Pack<Stored, kPack> stored = elements.load(at.i, at.n);
  Pack<Rest, kPack> rest = {};
  if constexpr (Codec::kIsGrouped) {
    const auto* const scales = static_cast<const Rest*>(beside) + at.begin / kGroup;
    RANGER_ASSUME_GLOBAL(scales);
    const Rest scale = at.n > 0 ? scales[at.i / kGroup] : Rest();
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) rest.values[j] = scale;
  } else if constexpr (!std::is_same_v<Rest, NoRest>) {
    rest = Elements<Rest>(at.row, beside, kRestOf + stream, at.begin).load(at.i, at.n);
  }
  Values values;
  RANGER_UNROLL()
  for (int j = 0; j < kPack; ++j) {
    values.values[j] = Codec::template decode<float>(stored.values[j], rest.values[j]);
  }
  return values;
}

template <class Codec, template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE void store(const Place<Thread>& at, int stream, const Values& values,
                              const RandomBits& bits) {
  using Stored = typename Codec::Stored;
  using Rest = typename Codec::Rest;
  void* const beside = at.row.data[kRestOf + stream];
  const auto random = [&](int j) {
    return Codec::kIsRandom ? bits.of(at.position() + static_cast<uint32_t>(j)) : 0;
  };
  Pack<Stored, kPack> stored;
  if constexpr (Codec::kIsGrouped) {
    Values coded;
    uint32_t largest = 0;
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) {
      coded.values[j] = Codec::coded(values.values[j]);
      const uint32_t magnitude = j < at.n ? bits_of(coded.values[j]) & kMagnitude : 0;
      largest = magnitude > largest ? magnitude : largest;
    }
    const Rest scale = Codec::scale_of(at.thread.largest_of(largest));
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) {
      stored.values[j] = Codec::encode(coded.values[j], random(j), scale);
    }
    auto* const scales = static_cast<Rest*>(beside) + at.begin / kGroup;
    RANGER_ASSUME_GLOBAL(scales);
    if (at.n > 0 && at.i % kGroup == 0) scales[at.i / kGroup] = scale;
  } else {
    Pack<Rest, kPack> rest;
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) {
      Codec::encode(values.values[j], random(j), stored.values[j], rest.values[j]);
    }
    if constexpr (!std::is_same_v<Rest, NoRest>) {
      Elements<Rest>(at.row, beside, kRestOf + stream, at.begin).store(at.i, at.n, rest);
    }
  }
  Elements<Stored>(at.row, at.row.data[stream], stream, at.begin).store(at.i, at.n, stored);
}

template <template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE Values load_grad(const Place<Thread>& at, const void* grad) {
  return by_grad_dtype(static_cast<DType>(at.row.grad_dtype), [&](auto zero) {
    using Stored = decltype(zero);
    const Elements<Stored> elements(at.row, grad, kGrad, at.begin);
    const Pack<Stored, kPack> stored = elements.load(at.i, at.n);
    Values values;
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) {
      values.values[j] = Plain<Stored>::template decode<float>(stored.values[j]);
    }
    return values;
  });
}

// --- parameters ----------------------------------------------------------------------------------

// Calls `run` with the codec of the row's parameters: float32, or one of those of 16 bits. Which of
// these is a branch, the same for a row: kernels for each would be seven times as many.
struct Float32Parameters {
  template <class Run>
  static RANGER_HOST_DEVICE decltype(auto) by_codec(int32_t, const Run& run) {
    return run(Plain<float>());
  }
};

struct LowParameters {
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

template <class Parameters, template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE Values load_param(const Place<Thread>& at) {
  return Parameters::by_codec(
      at.row.codec, [&](auto codec) { return load<decltype(codec), Elements>(at, kParam); });
}

template <class Parameters, template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE Values load_slow(const Place<Thread>& at) {
  return Parameters::by_codec(at.row.codec, [&](auto codec) {
    return load<typename SnapshotOf<decltype(codec)>::Codec, Elements>(at, kSlowParam);
  });
}

// Loaded when there are registers to spare, and not with all else.
template <class Parameters, template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE void pull(const Place<Thread>& at, Values& p, float alpha) {
  const Values slow = load_slow<Parameters, Elements>(at);
  RANGER_UNROLL()
  for (int j = 0; j < kPack; ++j) p.values[j] = lookahead(p.values[j], slow.values[j], alpha);
}

// `sync`: the slow weight, too, is the same value.
template <class Parameters, template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE void store_param(const Place<Thread>& at, const Values& p, bool sync,
                                    const RandomKeys& keys) {
  const RandomBits random = keys.of_param();
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
      Values p = load_param<Parameters, Elements>(at);
      const Values g = load_grad<Elements>(at, staged.scalars.grad);
      Values m = load<typename Format::ExpAvg, Elements>(at, kExpAvg);
      Values v = load<typename Format::ExpAvgSq, Elements>(at, kExpAvgSq);
      RANGER_UNROLL()
      for (int j = 0; j < kPack; ++j) {
        const Element<float> x = radam(Element<float>{p.values[j], m.values[j], v.values[j]},
                                       g.values[j], c, l2, rectified);
        p.values[j] = x.p;
        m.values[j] = x.m;
        v.values[j] = x.v;
      }
      if (sync) pull<Parameters, Elements>(at, p, c.alpha);
      store_param<Parameters, Elements>(at, p, sync, keys);
      store<typename Format::ExpAvg, Elements>(at, kExpAvg, m, keys.of_exp_avg());
      store<typename Format::ExpAvgSq, Elements>(at, kExpAvgSq, v, keys.of_exp_avg_sq());
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
    const float alpha = staged.scalars.f32.alpha;
    const Span span = span_of(chunk, staged.row.numel);
    for_each_place(thread, staged.row, span, [&](const Place<Thread>& at) {
      Values p = load_param<LowParameters, Elements>(at);
      pull<LowParameters, Elements>(at, p, alpha);
      store_param<LowParameters, Elements>(at, p, true, staged.scalars.keys);
    });
  }
};

}  // namespace ranger::cuda
