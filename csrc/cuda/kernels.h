// The kernels' bodies, over a thread that says where it is. nvcc makes kernels of them
// (runtime.h); the tests run every thread of every block on the CPU (tests/emulation).
#pragma once

#include "../radam_lookahead.h"
#include "tables.h"

namespace ranger::cuda {

// --- memory ------------------------------------------------------------------------------------

// `kWidth` neighbouring elements; 16 bytes of them are one access.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

template <typename T>
constexpr int kFullWidth = 16 / sizeof(T);

template <int kWidth, typename T>
RANGER_HOST_DEVICE Pack<T, kWidth> load(const T* from) {
  RANGER_ASSUME_GLOBAL(from);
  return *reinterpret_cast<const Pack<T, kWidth>*>(from);
}

template <int kWidth, typename T>
RANGER_HOST_DEVICE void store(T* to, const Pack<T, kWidth>& pack) {
  RANGER_ASSUME_GLOBAL(to);
  *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
}

// How many elements lie before the next 16-byte boundary.
template <typename T>
RANGER_HOST_DEVICE int elements_to_boundary(const T* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return static_cast<int>((0 - address) % 16 / sizeof(T));
}

// Where element `index` of a row lies in `stream`, in elements. A layout is the number of
// dimensions, their sizes, and then the strides of each stream, all outermost first.
RANGER_HOST_DEVICE int64_t strided_offset(const int64_t* layout, int stream, int64_t index) {
  const int64_t ndim = layout[0];
  const int64_t* sizes = layout + 1;
  const int64_t* strides = sizes + ndim * (1 + stream);
  int64_t offset = 0;
  RANGER_UNROLL(1)
  for (int64_t dim = ndim - 1; dim >= 0; --dim) {
    offset += index % sizes[dim] * strides[dim];
    index /= sizes[dim];
  }
  return offset;
}

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

struct ScheduleKernel {
  using Args = ScheduleArgs;
  struct Shared {};

  template <class Thread>
  RANGER_HOST_DEVICE static void run(const Thread& thread, const Args& args, Shared&) {
    const int64_t i = thread.block() * kThreads + thread.index();
    if (i >= args.row_count) return;
    const DeviceRow& row = args.tables.rows[args.first_row + i];
    RowScalars& scalars = args.tables.scalars[args.first_row + i];
    const bool active = args.active[i / 32] >> (i % 32) & 1;
    const bool overflown = args.found_inf.data != nullptr && args.found_inf.read() != 0.0;
    if (!active || overflown) {
      scalars.flags = 0;
      return;
    }
    const GroupArgs& group = args.groups[row.group - args.first_group];
    Hyperparameters hyper = group.hyper;
    if (group.lr.data != nullptr) hyper.lr = group.lr.read();
    const double unscale = args.grad_scale.data != nullptr ? 1.0 / args.grad_scale.read() : 1.0;
    const double norm = args.norm.data != nullptr ? args.norm.read() : 0.0;

    const int64_t step = static_cast<int64_t>(*row.step) + 1;
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
    scalars.flags =
        kActive | (now.rectified ? kRectified : 0) | (l2 ? kL2 : 0) | (sync ? kSync : 0);
    *row.step = static_cast<float>(step);
  }
};

// --- the fused step ------------------------------------------------------------------------------

// One span's memory, each pointer at its first element.
template <typename T>
struct Streams {
  T* __restrict__ p;
  const T* __restrict__ g;
  T* __restrict__ m;
  T* __restrict__ v;
  T* __restrict__ slow;
};

template <typename T>
struct Update {
  Coefficients<T> c;
  bool l2, rectified, sync;
};

template <int kWidth, typename T>
RANGER_HOST_DEVICE void update(const Streams<T>& s, int i, const Update<T>& u) {
  Pack<T, kWidth> p = load<kWidth>(s.p + i);
  const Pack<T, kWidth> g = load<kWidth>(s.g + i);
  Pack<T, kWidth> m = load<kWidth>(s.m + i);
  Pack<T, kWidth> v = load<kWidth>(s.v + i);
  Pack<T, kWidth> slow = {};
  if (u.sync) slow = load<kWidth>(s.slow + i);
  for (int j = 0; j < kWidth; ++j) {
    Element<T> x = radam(Element<T>{p.values[j], m.values[j], v.values[j]}, g.values[j], u.c, u.l2,
                         u.rectified);
    if (u.sync) x.p = slow.values[j] = lookahead(x.p, slow.values[j], u.c.alpha);
    p.values[j] = x.p;
    m.values[j] = x.m;
    v.values[j] = x.v;
  }
  store(s.p + i, p);
  store(s.m + i, m);
  store(s.v + i, v);
  if (u.sync) store(s.slow + i, slow);
}

// 16 bytes an access between a head and a tail of single elements. Where the streams lie
// differently to 16 bytes there is no such middle, and everything is head.
template <class Thread, class Body>
RANGER_HOST_DEVICE void for_each_pack(const Thread& thread, int count, int head, int width,
                                      const Body& body) {
  const int middle = head + (count - head) / width * width;
  RANGER_UNROLL(kUnroll)
  for (int i = head + thread.index() * width; i < middle; i += kThreads * width) body.packed(i);
  const int singles = head + count - middle;
  RANGER_UNROLL(1)
  for (int i = thread.index(); i < singles; i += kThreads) {
    body.single(i < head ? i : i - head + middle);
  }
}

template <typename T>
struct RadamBody {
  const Streams<T>& s;
  const Update<T>& u;
  RANGER_HOST_DEVICE void packed(int i) const { update<kFullWidth<T>>(s, i, u); }
  RANGER_HOST_DEVICE void single(int i) const { update<1>(s, i, u); }
};

// RAdam and, where a cycle ends, Lookahead.
template <typename T, bool kStrided, int kCapacity>
struct RadamKernel {
  using Args = StepArgs<kCapacity>;
  using Shared = StagedRow;

  template <class Thread>
  RANGER_HOST_DEVICE static void run(const Thread& thread, const Args& args, Shared& staged) {
    const ChunkRef chunk = args.tables.chunks[thread.block()];
    stage(thread, args.tables, chunk.row, staged);
    const int64_t flags = staged.scalars.flags;
    if (!(flags & kActive)) return;
    const DeviceRow& row = staged.row;
    const T* grad = static_cast<const T*>(args.grads[chunk.row - args.first_row]);
    const Update<T> u{coefficients_of<T>(staged.scalars), (flags & kL2) != 0,
                      (flags & kRectified) != 0, (flags & kSync) != 0};
    const Span span = span_of(chunk, row.numel);
    T* const p = static_cast<T*>(row.data[kParam]);
    T* const m = static_cast<T*>(row.data[kExpAvg]);
    T* const v = static_cast<T*>(row.data[kExpAvgSq]);
    T* const slow = static_cast<T*>(row.data[kSlowParam]);
    if (kStrided) {
      RANGER_UNROLL(1)
      for (int i = thread.index(); i < span.count; i += kThreads) {
        const int64_t index = span.begin + i;
        const int64_t* at = row.layout;
        update<1>(Streams<T>{p + strided_offset(at, kParam, index),
                             grad + strided_offset(at, kGrad, index),
                             m + strided_offset(at, kExpAvg, index),
                             v + strided_offset(at, kExpAvgSq, index),
                             u.sync ? slow + strided_offset(at, kSlowParam, index) : nullptr},
                  0, u);
      }
      return;
    }
    const Streams<T> s{p + span.begin, grad + span.begin, m + span.begin, v + span.begin,
                       u.sync ? slow + span.begin : nullptr};
    const int before = elements_to_boundary(s.p);
    const bool alike = elements_to_boundary(s.g) == before && elements_to_boundary(s.m) == before &&
                       elements_to_boundary(s.v) == before &&
                       (!u.sync || elements_to_boundary(s.slow) == before);
    const int head = alike && before < span.count ? before : span.count;
    for_each_pack(thread, span.count, head, kFullWidth<T>, RadamBody<T>{s, u});
  }
};

// --- parameters and slow weights alone -----------------------------------------------------------

struct PassArgs {
  Tables tables;
};

// `Rule` has `applies(staged)`, and `apply(p, slow, alpha)`, which sets both.
template <typename T, bool kStrided, class Rule>
struct SlowKernel {
  using Args = PassArgs;
  using Shared = StagedRow;

  struct Body {
    T* __restrict__ p;
    T* __restrict__ slow;
    T alpha;

    template <int kWidth>
    RANGER_HOST_DEVICE void at(int64_t p_offset, int64_t slow_offset) const {
      Pack<T, kWidth> a = load<kWidth>(p + p_offset);
      Pack<T, kWidth> b = load<kWidth>(slow + slow_offset);
      for (int j = 0; j < kWidth; ++j) Rule::apply(a.values[j], b.values[j], alpha);
      store(p + p_offset, a);
      store(slow + slow_offset, b);
    }
    RANGER_HOST_DEVICE void packed(int i) const { at<kFullWidth<T>>(i, i); }
    RANGER_HOST_DEVICE void single(int i) const { at<1>(i, i); }
  };

  template <class Thread>
  RANGER_HOST_DEVICE static void run(const Thread& thread, const Args& args, Shared& staged) {
    const ChunkRef chunk = args.tables.chunks[thread.block()];
    stage(thread, args.tables, chunk.row, staged);
    if (!Rule::applies(staged)) return;
    const DeviceRow& row = staged.row;
    const Span span = span_of(chunk, row.numel);
    const int64_t start = kStrided ? 0 : span.begin;
    const Body body{static_cast<T*>(row.data[kParam]) + start,
                    static_cast<T*>(row.data[kSlowParam]) + start,
                    coefficients_of<T>(staged.scalars).alpha};
    if (kStrided) {
      RANGER_UNROLL(1)
      for (int i = thread.index(); i < span.count; i += kThreads) {
        const int64_t index = span.begin + i;
        body.template at<1>(strided_offset(row.layout, kParam, index),
                            strided_offset(row.layout, kSlowParam, index));
      }
      return;
    }
    const int before = elements_to_boundary(body.p);
    const bool alike = elements_to_boundary(body.slow) == before;
    const int head = alike && before < span.count ? before : span.count;
    for_each_pack(thread, span.count, head, kFullWidth<T>, body);
  }
};

// The Lookahead interpolation after another optimizer's step.
struct Interpolation {
  RANGER_HOST_DEVICE static bool applies(const StagedRow& staged) {
    return (staged.scalars.flags & kSync) != 0;
  }
  template <typename T>
  RANGER_HOST_DEVICE static void apply(T& p, T& slow, T alpha) {
    p = slow = lookahead(p, slow, alpha);
  }
};

// Parameters and slow weights change places.
struct Swap {
  RANGER_HOST_DEVICE static bool applies(const StagedRow& staged) {
    return staged.row.data[kSlowParam] != nullptr;
  }
  template <typename T>
  RANGER_HOST_DEVICE static void apply(T& p, T& slow, T) {
    const T kept = p;
    p = slow;
    slow = kept;
  }
};

}  // namespace ranger::cuda
