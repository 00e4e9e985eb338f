// The kernels' bodies, over a thread that says where it is. nvcc makes kernels of them
// (runtime.h); the tests run every thread of every block on the CPU (tests/emulation).
#pragma once

#include <cstring>

#include "../rule/radam_lookahead.h"
#include "memory.h"
#include "tables.h"

namespace ranger::cuda {

// float64 takes twice the registers; places of strided elements take too many to ask for any.
template <typename T>
constexpr int kPacksOf = sizeof(T) > 4 ? (kPacks + 1) / 2 : kPacks;
template <typename T, bool kStrided>
constexpr int kLeastBlocksOf = kStrided        ? 1
                               : sizeof(T) > 4 ? (kBlocks + 1) / 2
                                               : kBlocks;

// --- a block's row, staged in shared memory ------------------------------------------------------

struct StagedRow {
  DeviceRow row;
  RowScalars scalars;
};

template <typename T>
RANGER_HOST_DEVICE const Coefficients<T>& coefficients_of(const RowScalars& scalars);
template <>
RANGER_HOST_DEVICE const Coefficients<float>& coefficients_of(const RowScalars& scalars) {
  return scalars.f32;
}
template <>
RANGER_HOST_DEVICE const Coefficients<double>& coefficients_of(const RowScalars& scalars) {
  return scalars.f64;
}

using Word = uint64_t __attribute__((may_alias));
constexpr int kRowWords = sizeof(DeviceRow) / sizeof(Word);
constexpr int kStagedWords = kRowWords + sizeof(RowScalars) / sizeof(Word);
static_assert(sizeof(StagedRow) == kStagedWords * sizeof(Word));

// One coalesced read for the block instead of one by each thread, field after field.
template <class Thread>
RANGER_HOST_DEVICE void stage(const Thread& thread, const Tables& tables, int32_t row,
                              StagedRow& staged) {
  const Word* rows = reinterpret_cast<const Word*>(tables.rows + row);
  const Word* scalars = reinterpret_cast<const Word*>(tables.scalars + row);
  Word* to = reinterpret_cast<Word*>(&staged);
  RANGER_UNROLL(1)
  for (int i = thread.index(); i < kStagedWords; i += kThreads) {
    to[i] = i < kRowWords ? rows[i] : scalars[i - kRowWords];
  }
  thread.barrier();
}

// A block's part of a row.
struct Span {
  int64_t begin;
  int count;
};

RANGER_HOST_DEVICE Span span_of(const ChunkRef& chunk, int64_t numel) {
  const int64_t begin = chunk.index * kChunkSize;
  const int64_t rest = numel - begin;
  return {begin, static_cast<int>(rest < kChunkSize ? rest : kChunkSize)};
}

// --- the schedule: one thread a parameter --------------------------------------------------------

template <int kWords>
struct ScheduleKernel {
  using Args = ScheduleArgs<kWords>;
  struct Shared {};
  static constexpr int kLeastBlocks = 1;

  template <class Thread>
  RANGER_HOST_DEVICE static void run(const Thread& thread, const Args& args, Shared&) {
    const ScheduleHeader& header = args.header;
    const int64_t i = thread.block() * kThreads + thread.index();
    if (i >= header.row_count) return;
    const DeviceRow& row = header.tables.rows[header.first_row + i];
    RowScalars& scalars = header.tables.scalars[header.first_row + i];
    const uint64_t grad = args.words[header.group_count * kGroupWords + i];
    const bool skipped = header.found_inf.data != nullptr && header.found_inf.read() != 0.0;
    if (grad == 0 || skipped) {
      scalars.flags = 0;
      return;
    }
    scalars.grad = reinterpret_cast<const void*>(grad);
    if (header.purpose == kForGradients) {
      scalars.flags = kActive;
      return;
    }
    GroupArgs group;
    std::memcpy(static_cast<void*>(&group),
                args.words + (row.group - header.first_group) * kGroupWords, sizeof(group));
    Hyperparameters hyper = group.hyper;
    if (group.lr.data != nullptr) hyper.lr = group.lr.read();
    const double unscale = header.grad_scale.data != nullptr ? 1.0 / header.grad_scale.read() : 1.0;
    const double norm = header.norm.data != nullptr ? header.norm.read() : 0.0;

    float* const count = row.step;
    RANGER_ASSUME_GLOBAL(count);
    const int64_t step = static_cast<int64_t>(*count) + 1;
    const Schedule now = schedule(hyper, step);
    const double scale = grad_scale(hyper, unscale, norm);
    bool l2;
    if (row.is_float64) {
      scalars.f64 = coefficients<double>(hyper, now, scale);
      l2 = scalars.f64.weight_decay != 0.0;
    } else {
      scalars.f32 = coefficients<float>(hyper, now, scale);
      l2 = scalars.f32.weight_decay != 0.0f;
    }
    const bool sync = now.sync && row.data[kSlowParam] != nullptr;
    const bool outer = sync && row.data[kOuterMomentumBuffer] != nullptr;
    const bool bounded = hyper.low > -INFINITY || hyper.high < INFINITY;
    scalars.flags = kActive | (now.rectified ? kRectified : 0) | (l2 ? kL2 : 0) |
                    (sync ? kSync : 0) | (outer ? kOuter : 0) | (bounded ? kBounded : 0);
    scalars.keys = random_keys(hyper.seed, row.place, step, header.purpose == kForPull);
    *count = static_cast<float>(step);
  }
};

// --- the fused step ------------------------------------------------------------------------------

template <class Format>
struct Streams {
  using Value = typename Format::Value;
  Memory<typename Format::Param, Value> p;
  GradMemory<Value> g;
  Memory<typename Format::ExpAvg, Value> m;
  Memory<typename Format::ExpAvgSq, Value> v;
  Memory<typename Format::SlowParam, Value> slow;
  Memory<typename Format::OuterMomentumBuffer, Value> b;
};

template <typename T>
struct Update {
  Coefficients<T> c;
  bool l2, rectified, sync, outer;
  const RowScalars& staged;  // the same, for what is rare: it takes no registers meanwhile
};

// Moves `kCount` packs from element `first` on, kThreads of them apart, as far as they lie before
// `end`. All loads come before the first store, so that they wait for memory side by side.
template <int kWidth, int kCount, class Format, typename T>
RANGER_HOST_DEVICE void update(const Streams<Format>& s, int first, int end, const Update<T>& u) {
  constexpr int kApart = kThreads * kWidth;
  Pack<T, kWidth> p[kCount] = {}, g[kCount] = {}, m[kCount] = {}, v[kCount] = {}, slow[kCount] = {};
  RANGER_UNROLL()
  for (int n = 0; n < kCount; ++n) {
    const int i = first + n * kApart;
    if (i >= end) continue;
    p[n] = s.p.template load<kWidth>(i);
    g[n] = s.g.template load<kWidth>(i);
    m[n] = s.m.template load<kWidth>(i);
    v[n] = s.v.template load<kWidth>(i);
    if (u.sync) slow[n] = s.slow.template load<kWidth>(i);
  }
  RANGER_UNROLL()
  for (int n = 0; n < kCount; ++n) {
    RANGER_UNROLL()
    for (int j = 0; j < kWidth; ++j) {
      Element<T> x = radam(Element<T>{p[n].values[j], m[n].values[j], v[n].values[j]},
                           g[n].values[j], u.c, u.l2, u.rectified);
      if (u.sync && !u.outer) x.p = lookahead(x.p, slow[n].values[j], u.c.alpha);
      p[n].values[j] = x.p;
      m[n].values[j] = x.m;
      v[n].values[j] = x.v;
    }
  }
  if (u.outer) {  // here, where there are registers to spare
    Pack<T, kWidth> b[kCount] = {};
    RANGER_UNROLL()
    for (int n = 0; n < kCount; ++n) {
      const int i = first + n * kApart;
      if (i < end) b[n] = s.b.template load<kWidth>(i);
    }
    RANGER_UNROLL()
    for (int n = 0; n < kCount; ++n) {
      const int i = first + n * kApart;
      RANGER_UNROLL()
      for (int j = 0; j < kWidth; ++j) {
        p[n].values[j] = outer_step(p[n].values[j], slow[n].values[j], b[n].values[j], u.c);
      }
      if (i < end) s.b.store(i, b[n]);
    }
  }
  if (u.staged.flags & kBounded) {
    const Coefficients<T>& c = coefficients_of<T>(u.staged);
    RANGER_UNROLL()
    for (int n = 0; n < kCount; ++n) {
      RANGER_UNROLL()
      for (int j = 0; j < kWidth; ++j) p[n].values[j] = bounded(p[n].values[j], c);
    }
  }
  RANGER_UNROLL()
  for (int n = 0; n < kCount; ++n) {
    const int i = first + n * kApart;
    if (i >= end) continue;
    s.p.store(i, p[n]);
    s.m.store(i, m[n]);
    s.v.store(i, v[n]);
    if (u.sync) s.slow.store(i, p[n]);
  }
}

// Calls `body` for all elements of a block: packs, and single elements behind the last.
template <int kWidth, int kCount, class Thread, class Body>
RANGER_HOST_DEVICE void for_each_pack(const Thread& thread, int count, const Body& body) {
  const int packed = count / kWidth * kWidth;
  RANGER_UNROLL(1)
  for (int i = thread.index() * kWidth; i < packed; i += kThreads * kWidth * kCount) {
    body.template at<kWidth, kCount>(i, packed);
  }
  if (packed + thread.index() < count) body.template at<1, 1>(packed + thread.index(), count);
}

template <class Format>
struct RadamBody {
  const Streams<Format>& s;
  const Update<typename Format::Value>& u;
  template <int kWidth, int kCount>
  RANGER_HOST_DEVICE void at(int first, int end) const {
    update<kWidth, kCount>(s, first, end, u);
  }
};

// RAdam and, where a cycle ends, Lookahead.
template <class Format, bool kStrided>
struct RadamKernel {
  using Args = StepArgs;
  using Shared = StagedRow;
  using T = typename Format::Value;
  static constexpr int kLeastBlocks = kLeastBlocksOf<T, kStrided>;

  template <class Thread>
  RANGER_HOST_DEVICE static void run(const Thread& thread, const Args& args, Shared& staged) {
    const ChunkRef chunk = args.tables.chunks[thread.block()];
    stage(thread, args.tables, chunk.row, staged);
    const int64_t flags = staged.scalars.flags;
    if (!(flags & kActive)) return;
    const DeviceRow& row = staged.row;
    const Update<T> u{coefficients_of<T>(staged.scalars),
                      (flags & kL2) != 0,
                      (flags & kRectified) != 0,
                      (flags & kSync) != 0,
                      (flags & kOuter) != 0,
                      staged.scalars};
    const Span span = span_of(chunk, row.numel);
    const auto from = [&](int64_t p, int64_t g, int64_t m, int64_t v, int64_t slow, int64_t b) {
      return Streams<Format>{{row.data[kParam], p},
                             {staged.scalars.grad, g, static_cast<DType>(row.grad_dtype)},
                             {row.data[kExpAvg], m},
                             {row.data[kExpAvgSq], v},
                             {row.data[kSlowParam], slow},
                             {row.data[kOuterMomentumBuffer], b}};
    };
    if constexpr (kStrided) {
      RANGER_UNROLL(1)
      for (int i = thread.index(); i < span.count; i += kThreads) {
        const auto at = [&](int stream) {
          return strided_offset(row.layout, stream, span.begin + i);
        };
        const Streams<Format> s =
            from(at(kParam), at(kGrad), at(kExpAvg), at(kExpAvgSq), u.sync ? at(kSlowParam) : 0,
                 u.outer ? at(kOuterMomentumBuffer) : 0);
        update<1, 1>(s, 0, 1, u);
      }
    } else {
      const int64_t begin = span.begin;
      const Streams<Format> s = from(begin, begin, begin, begin, begin, begin);
      for_each_pack<Format::kPackWidth, kPacksOf<T>>(thread, span.count, RadamBody<Format>{s, u});
    }
  }
};

// --- parameters and slow weights alone -----------------------------------------------------------

// `Move` has `applies(staged)`, whether there is outer momentum, and `apply(p, slow, b, c, outer)`,
// which sets all three. `A`: the type of the coefficients.
template <class Codec, typename T, typename A, int kPackWidth, bool kStrided, class Move>
struct SlowKernel {
  using Args = StepArgs;
  using Shared = StagedRow;
  static constexpr int kLeastBlocks = kLeastBlocksOf<A, kStrided>;

  struct Body {
    Memory<Codec, T> p;
    Memory<Codec, T> slow;
    Memory<Codec, T> b;
    const Coefficients<A>& c;
    bool outer;

    template <int kWidth, int kCount>
    RANGER_HOST_DEVICE void at(int first, int end) const {
      constexpr int kApart = kThreads * kWidth;
      Pack<T, kWidth> of_p[kCount] = {}, of_slow[kCount] = {}, of_b[kCount] = {};
      RANGER_UNROLL()
      for (int n = 0; n < kCount; ++n) {
        const int i = first + n * kApart;
        if (i >= end) continue;
        of_p[n] = p.template load<kWidth>(i);
        of_slow[n] = slow.template load<kWidth>(i);
        if (outer) of_b[n] = b.template load<kWidth>(i);
      }
      RANGER_UNROLL()
      for (int n = 0; n < kCount; ++n) {
        const int i = first + n * kApart;
        if (i >= end) continue;
        RANGER_UNROLL()
        for (int j = 0; j < kWidth; ++j) {
          Move::apply(of_p[n].values[j], of_slow[n].values[j], of_b[n].values[j], c, outer);
        }
        p.store(i, of_p[n]);
        slow.store(i, of_slow[n]);
        if (outer) b.store(i, of_b[n]);
      }
    }
  };

  template <class Thread>
  RANGER_HOST_DEVICE static void run(const Thread& thread, const Args& args, Shared& staged) {
    const ChunkRef chunk = args.tables.chunks[thread.block()];
    stage(thread, args.tables, chunk.row, staged);
    if (!Move::applies(staged)) return;
    const DeviceRow& row = staged.row;
    const Span span = span_of(chunk, row.numel);
    const bool outer = Move::has_momentum(staged);
    const auto from = [&](int64_t p, int64_t slow, int64_t b) {
      return Body{{row.data[kParam], p},
                  {row.data[kSlowParam], slow},
                  {row.data[kOuterMomentumBuffer], b},
                  coefficients_of<A>(staged.scalars),
                  outer};
    };
    if constexpr (kStrided) {
      RANGER_UNROLL(1)
      for (int i = thread.index(); i < span.count; i += kThreads) {
        const auto at = [&](int stream) {
          return strided_offset(row.layout, stream, span.begin + i);
        };
        from(at(kParam), at(kSlowParam), outer ? at(kOuterMomentumBuffer) : 0)
            .template at<1, 1>(0, 1);
      }
    } else {
      const int64_t begin = span.begin;
      for_each_pack<kPackWidth, kPacksOf<A>>(thread, span.count, from(begin, begin, begin));
    }
  }
};

// The Lookahead interpolation after another optimizer's step.
struct Interpolation {
  RANGER_HOST_DEVICE static bool applies(const StagedRow& staged) {
    return (staged.scalars.flags & kSync) != 0;
  }
  RANGER_HOST_DEVICE static bool has_momentum(const StagedRow& staged) {
    return (staged.scalars.flags & kOuter) != 0;
  }
  template <typename T>
  RANGER_HOST_DEVICE static void apply(T& p, T& slow, T& b, const Coefficients<T>& c, bool outer) {
    p = slow = outer ? outer_step(p, slow, b, c) : lookahead(p, slow, c.alpha);
  }
};

// Parameters and slow weights change places.
struct Swap {
  RANGER_HOST_DEVICE static bool applies(const StagedRow& staged) {
    return staged.row.data[kSlowParam] != nullptr;
  }
  RANGER_HOST_DEVICE static bool has_momentum(const StagedRow&) { return false; }
  template <typename T, typename A>
  RANGER_HOST_DEVICE static void apply(T& p, T& slow, T&, const Coefficients<A>&, bool) {
    const T kept = p;
    p = slow;
    slow = kept;
  }
};

template <typename T, bool kStrided>
using InterpolationKernel = SlowKernel<Plain<T>, T, T, 16 / sizeof(T), kStrided, Interpolation>;

// Bits change places, not values.
template <typename T, bool kStrided>
using SwapKernel = SlowKernel<Bits<T>, T, std::conditional_t<sizeof(T) == 8, double, float>,
                              16 / sizeof(T), kStrided, Swap>;

}  // namespace ranger::cuda
