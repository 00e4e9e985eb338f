// One pass over all chunks of a plan, on as many threads as asked for.
#pragma once

#include <vector>

#include "../plan.h"
#include "../schedule.h"

namespace ranger::cpu {

// Elements per chunk. 16,384 float32 elements of five streams are 320 KiB, about a core's L2 cache;
// smaller chunks cost dispatch, larger ones balance worse over threads (benchmarks/README.md).
constexpr int32_t kChunkSize = 16384;

// Below this many elements in all, starting a second thread costs more than it gives.
constexpr int64_t kSerialElements = 32768;

// A row's scalars for this step; `active` is false for a parameter that does not move.
struct RowSchedule {
  const Hyperparameters* hyper = nullptr;
  Schedule schedule = {};
  bool active = false;
};

// The fused RAdam + Lookahead step of every active row.
void radam_step(const std::vector<TensorRow>& rows, const std::vector<Chunk>& chunks,
                const std::vector<RowSchedule>& schedules, int num_threads);

// The Lookahead interpolation alone, of every active row whose schedule says sync.
void lookahead_step(const std::vector<TensorRow>& rows, const std::vector<Chunk>& chunks,
                    const std::vector<RowSchedule>& schedules, int num_threads);

}  // namespace ranger::cpu
