// Gradient centralization: gradients less the means of their slices, written where the step reads
// them. A kernel of its own: in the step's, whose registers are all taken, it would spill them.
#pragma once

#include "kernels.h"

namespace ranger::cuda {

struct CentralizeArgs {
  Tables tables;  // chunks: kSlices slices of a row each
  void* scratch;  // see DeviceRow
};

struct CentralizeKernel {
  using Args = CentralizeArgs;
  struct Shared {
    StagedRow staged;
    double room[kThreads];
  };
  static constexpr int kLeastBlocks = (kBlocks + 1) / 2;

  template <class Thread>
  RANGER_HOST_DEVICE static void run(const Thread& thread, const Args& args, Shared& shared) {
    const ChunkRef chunk = args.tables.chunks[thread.block()];
    stage(thread, args.tables, chunk.row, shared.staged);
    if (!(shared.staged.scalars.flags & kActive)) return;
    const int64_t slice = int64_t{chunk.index} * kSlices + thread.index() / kTeam;
    void* const to = static_cast<char*>(args.scratch) + shared.staged.row.scratch;
    shared.staged.row.is_float64
        ? Slice<double>{shared.staged, slice}.write(thread, shared.room, static_cast<double*>(to))
        : Slice<float>{shared.staged, slice}.write(thread, shared.room, static_cast<float*>(to));
  }

 private:
  static constexpr int kOwn = kLanes / kTeam;  // lanes of a thread, kTeam apart
  static_assert(kLanes % kTeam == 0);

  template <typename T>
  struct Slice {
    const StagedRow& staged;
    int64_t index;

    // Calls `run(first, values)` with the gradients of a thread's lanes, from element `first` of
    // the row on, kTeam apart; 0 beyond the slice's end.
    template <class Run>
    RANGER_HOST_DEVICE void for_each(int lane, const Run& run) const {
      const DeviceRow& row = staged.row;
      const int64_t end = (index + 1) * row.slice;
      RANGER_UNROLL(1)
      for (int64_t first = index * row.slice + lane; first < end; first += kLanes) {
        T values[kOwn] = {};
        RANGER_UNROLL()
        for (int n = 0; n < kOwn; ++n) {
          int64_t at = first + n * kTeam;
          if (at >= end) continue;
          if (row.layout != nullptr) at = strided_offset(row.layout, kGrad, at);
          const GradMemory<T> g(staged.scalars.grad, at, static_cast<DType>(row.grad_dtype));
          values[n] = g.template load<1>(0).values[0];
        }
        run(first, values);
      }
    }

    // All threads of the block call it.
    template <class Thread>
    RANGER_HOST_DEVICE void write(const Thread& thread, void* of_block, T* to) const {
      const int64_t length = staged.row.slice;
      const bool is_there = index * length < staged.row.numel;
      const int lane = thread.index() % kTeam;
      T sums[kOwn] = {};
      if (is_there) {
        for_each(lane, [&](int64_t, const T(&values)[kOwn]) {
          RANGER_UNROLL()
          for (int n = 0; n < kOwn; ++n) sums[n] += values[n];
        });
      }
      RANGER_UNROLL()
      for (int left = kOwn / 2; left > 0; left /= 2) {
        RANGER_UNROLL()
        for (int n = 0; n < left; ++n) sums[n] += sums[left + n];
      }
      T* const room = static_cast<T*>(of_block) + thread.index();
      *room = sums[0];
      thread.barrier();
      RANGER_UNROLL(1)
      for (int left = kTeam / 2; left > 0; left /= 2) {
        if (lane < left) *room += room[left];
        thread.barrier();
      }
      if (!is_there) return;
      const T its = mean(room[-lane], length);
      RANGER_ASSUME_GLOBAL(to);
      for_each(lane, [&](int64_t first, const T(&values)[kOwn]) {
        RANGER_UNROLL()
        for (int n = 0; n < kOwn; ++n) {
          const int64_t at = first + n * kTeam;
          if (at < (index + 1) * length) to[at] = centralized(values[n], its);
        }
      });
    }
  };
};

}  // namespace ranger::cuda
