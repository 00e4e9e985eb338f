// One device's part of a plan: its tables on the device, and the launches of a step.
#pragma once

#include <memory>
#include <vector>

#include "geometry.h"

namespace ranger::cuda {

// What a step reads on the device, and nobody on the host.
struct Signals {
  DeviceScalar grad_scale;       // of GradScaler; the gradients are multiplied by its inverse
  DeviceScalar found_inf;        // of GradScaler; not 0: the step is skipped
  DeviceScalar norm;             // of all gradients
  std::vector<DeviceScalar> lr;  // of each group; without data: the host's number
};

// `rows` are the whole plan's, in every call. Rows of other devices are none of its business.
class DevicePlan {
 public:
  explicit DevicePlan(int32_t device) : device_(device) {}

  int32_t device() const { return device_; }

  // Brings the tables to the device, if the rows are not those of the last call. May fail; the
  // launches after it can only where the device does.
  void prepare(const std::vector<TensorRow>& rows);
  void forget() { stale_ = true; }

  // Counts a step for each active row and finds its scalars. `active`: for each row of the plan.
  void schedule(const std::vector<TensorRow>& rows, const std::vector<char>& active,
                const std::vector<Hyperparameters>& hypers, const Signals& signals, void* stream);
  // After schedule(): the fused step, or the interpolation alone.
  void radam(const std::vector<TensorRow>& rows, const std::vector<char>& active, void* stream);
  void lookahead(void* stream);
  // On its own: parameters and slow weights change places.
  void swap(void* stream);

 private:
  struct DeviceTables;

  Tables tables(int64_t first_chunk) const;
  template <class Rule>
  void pass(void* stream);

  int32_t device_;
  bool stale_ = false;
  Geometry geometry_;
  std::shared_ptr<const DeviceTables> tables_;
};

}  // namespace ranger::cuda
