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

// The scalars of one step of one group, shared by its parameters that are at the same step.
struct StepScalars {
  StepScalars(const Hyperparameters& hyper, int64_t step, double grad_scale)
      : schedule(ranger::schedule(hyper, step)),
        f32(coefficients<float>(hyper, schedule, grad_scale)),
        f64(coefficients<double>(hyper, schedule, grad_scale)) {}

  Schedule schedule;
  Coefficients<float> f32;
  Coefficients<double> f64;
};

// For each row its scalars; nullptr for a parameter that does not move in this step.
using RowScalars = std::vector<const StepScalars*>;

// The fused RAdam + Lookahead step of every active row.
void radam_step(const std::vector<TensorRow>& rows, const std::vector<Chunk>& chunks,
                const RowScalars& scalars, int num_threads);

// The Lookahead interpolation alone, of every active row whose schedule says sync.
void lookahead_step(const std::vector<TensorRow>& rows, const std::vector<Chunk>& chunks,
                    const RowScalars& scalars, int num_threads);

// Parameters and slow weights of every row that has them change places, bit for bit.
void swap_slow_weights(const std::vector<TensorRow>& rows, const std::vector<Chunk>& chunks,
                       int num_threads);

}  // namespace ranger::cpu
