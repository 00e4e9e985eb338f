// The CPU's launcher: one pass over all chunks of its rows, on as many threads as asked for.
#pragma once

#include <deque>
#include <vector>

#include "../formats/rows.h"
#include "../rule/schedule.h"

namespace ranger::cpu {

// Elements per chunk. 16,384 float32 elements of five streams are 320 KiB, about a core's L2 cache;
// smaller chunks cost dispatch, larger ones balance worse over threads (benchmarks/README.md).
constexpr int32_t kChunkSize = 16384;

// Below this many elements in all, starting a second thread costs more than it gives.
constexpr int64_t kSerialElements = 32768;

// The scalars of one step of one group, shared by its parameters that are at the same step.
struct StepScalars {
  StepScalars(const Hyperparameters& hyper, int64_t step, double grad_scale)
      : seed(hyper.seed),
        step(step),
        schedule(ranger::schedule(hyper, step)),
        f32(coefficients<float>(hyper, schedule, grad_scale)),
        f64(coefficients<double>(hyper, schedule, grad_scale)) {}

  int64_t seed;
  int64_t step;
  Schedule schedule;
  Coefficients<float> f32;
  Coefficients<double> f64;
};

// `count` elements of row `row`, from element `begin`: whole groups and whole slices.
struct Chunk {
  int32_t row;
  int64_t begin;
  int64_t count;
};

// What gradients are multiplied by: see grad_scale().
struct Signals {
  double unscale = 1.0;
  double norm = 1.0;
};

// `rows` are the whole optimizer's, in every call: the same from prepare() to what follows it. Rows
// of other launchers are none of its business.
class Launcher {
 public:
  // `index`: that of its rows.
  Launcher(Rule rule, int32_t index) : rule_(rule), index_(index) {}

  // Cuts the rows into chunks, if they are not those of the last call.
  void prepare(const Rows& rows);
  // Counts a step for each active row and runs the rule on it. `hypers`: one for each group.
  void launch(const Rows& rows, const std::vector<Hyperparameters>& hypers, const Signals& signals,
              int num_threads);
  // The sum of the squares of the active rows' gradients; of those whose places are among `places`,
  // unless it is empty.
  double squares(const Rows& rows, const std::vector<int32_t>& places, int num_threads) const;
  // Parameters and slow weights of each active row change places, bit for bit.
  void swap(const Rows& rows, int num_threads) const;

  int64_t prepared_version() const { return version_; }

 private:
  Rule rule_;
  int32_t index_;
  int64_t version_ = -1;
  std::vector<Chunk> chunks_;
  std::deque<StepScalars> scalars_;
  std::vector<const StepScalars*> of_row_;  // nullptr: it does not move in this step
};

}  // namespace ranger::cpu
