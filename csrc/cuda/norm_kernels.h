// The sum of the squares of gradients, for clipping by their norm: one pass over the chunks of a
// step, in float64 and in a fixed order.
#pragma once

#include "kernels.h"

namespace ranger::cuda {

struct SquaresArgs {
  Tables tables;
  double* of_chunks;  // of this launch's first block
};

struct TotalArgs {
  const double* of_chunks;
  int64_t count;
  double* total;
};

// The sum of what the threads of a block have, in thread 0. `room`: kThreads values.
template <class Thread>
RANGER_HOST_DEVICE double sum_of_block(const Thread& thread, double value, double* room) {
  constexpr int kSixteenth = (kThreads + 15) / 16;
  const int index = thread.index();
  room[index] = value;
  thread.barrier();
  double sum = 0.0;
  if (index < kSixteenth) {
    for (int i = index; i < kThreads; i += kSixteenth) sum += room[i];
  }
  thread.barrier();
  if (index < kSixteenth) room[index] = sum;
  thread.barrier();
  if (index != 0) return 0.0;
  for (int i = 1; i < kSixteenth; ++i) sum += room[i];
  return sum;
}

// Of a chunk's gradients; 0 for a row that does not move.
template <bool kStrided>
struct SquaresKernel {
  using Args = SquaresArgs;
  struct Shared {
    StagedRow staged;
    double room[kThreads];
  };
  static constexpr int kLeastBlocks = kBlocks;

  struct Body {
    const GradMemory<double>& g;
    bool narrow;  // as the step reads float64 gradients of float32 values
    double& sum;
    template <int kWidth, int kCount>
    RANGER_HOST_DEVICE void at(int first, int end) const {
      Pack<double, kWidth> values[kCount] = {};
      RANGER_UNROLL()
      for (int n = 0; n < kCount; ++n) {
        const int i = first + n * kThreads * kWidth;
        if (i < end) values[n] = g.template load<kWidth>(i);
      }
      RANGER_UNROLL()
      for (int n = 0; n < kCount; ++n) {
        RANGER_UNROLL()
        for (int j = 0; j < kWidth; ++j) {
          double value = values[n].values[j];
          if (narrow) value = static_cast<float>(value);
          sum += value * value;
        }
      }
    }
  };

  template <class Thread>
  RANGER_HOST_DEVICE static void run(const Thread& thread, const Args& args, Shared& shared) {
    const ChunkRef chunk = args.tables.chunks[thread.block()];
    stage(thread, args.tables, chunk.row, shared.staged);
    const DeviceRow& row = shared.staged.row;
    const RowScalars& scalars = shared.staged.scalars;
    double sum = 0.0;
    if (scalars.flags & kActive) {
      const Span span = span_of(chunk, row.numel);
      const bool narrow = !row.is_float64;
      const auto from = [&](int64_t first) {
        return GradMemory<double>(scalars.grad, first, static_cast<DType>(row.grad_dtype));
      };
      if constexpr (kStrided) {
        const int64_t* const layout = row.layout;
        RANGER_ASSUME_GLOBAL(layout);
        RANGER_UNROLL(1)
        for (int i = thread.index(); i < span.count; i += kThreads) {
          const GradMemory<double> g = from(strided_offset(layout, kGrad, span.begin + i));
          Body{g, narrow, sum}.template at<1, 1>(0, 1);
        }
      } else {
        const GradMemory<double> g = from(span.begin);
        for_each_pack<4, kPacks>(thread, span.count, Body{g, narrow, sum});
      }
    }
    sum = sum_of_block(thread, sum, shared.room);
    double* const of_chunks = args.of_chunks;
    RANGER_ASSUME_GLOBAL(of_chunks);
    if (thread.index() == 0) of_chunks[thread.block()] = sum;
  }
};

// Of all chunks, by a single block.
struct TotalKernel {
  using Args = TotalArgs;
  struct Shared {
    double room[kThreads];
  };
  static constexpr int kLeastBlocks = 1;

  template <class Thread>
  RANGER_HOST_DEVICE static void run(const Thread& thread, const Args& args, Shared& shared) {
    const double* const of_chunks = args.of_chunks;
    double* const total = args.total;
    RANGER_ASSUME_GLOBAL(of_chunks);
    RANGER_ASSUME_GLOBAL(total);
    double sum = 0.0;
    for (int64_t i = thread.index(); i < args.count; i += kThreads) sum += of_chunks[i];
    sum = sum_of_block(thread, sum, shared.room);
    if (thread.index() == 0) *total = sum;
  }
};

}  // namespace ranger::cuda
