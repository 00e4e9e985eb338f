// A CUDA device's launcher: its tables on the device, and the launches of a step.
#pragma once

#include <memory>
#include <vector>

#include "geometry.h"

namespace ranger::cuda {

class DeviceMemory;

// Where the rows lie, as DLPack counts.
#if defined(RANGER_EMULATE_CUDA)
constexpr int kDeviceType = 1;
#else
constexpr int kDeviceType = 2;
#endif

// What a step reads on the device, and nobody on the host.
struct Signals {
  DeviceScalar grad_scale;       // of GradScaler; the gradients are multiplied by its inverse
  DeviceScalar found_inf;        // of GradScaler; not 0: the step is skipped
  DeviceScalar norm;             // of all gradients
  std::vector<DeviceScalar> lr;  // of each group; without data: the host's number
};

// `rows` are the whole optimizer's, in every call: the same from prepare() to what follows it. Rows
// of other launchers are none of its business.
class Launcher {
 public:
  // `index`: that of its rows, which are on `device`.
  Launcher(Rule rule, int32_t index, int32_t device)
      : rule_(rule), index_(index), device_(device) {}

  int32_t device() const { return device_; }

  // Brings the tables to the device, if the rows are not those of the last call. May fail; what
  // follows it can only where the device does.
  void prepare(const Rows& rows);
  // Counts a step for each active row, finds its scalars, and runs the rule on it. `scratch`: so
  // much memory of the device as scratch_size() says, until the stream has come past the step.
  void launch(const Rows& rows, const std::vector<Hyperparameters>& hypers, const Signals& signals,
              void* scratch, void* stream);
  // In bytes, from prepare() on: for gradients that are centralized.
  int64_t scratch_size() const { return geometry_.scratch_size; }
  // Writes to `total`, on the device, the sum of the squares of the active rows' gradients; of
  // those whose places are among `places`, unless it is empty.
  void squares(const Rows& rows, const std::vector<int32_t>& places, double* total, void* stream);
  // Parameters and slow weights of all rows change places.
  void swap(void* stream);

  int64_t prepared_version() const { return version_; }

 private:
  struct DeviceTables;

  Tables tables(const DeviceMemory& rows, const DeviceMemory& chunks, int64_t first_chunk) const;
  // Tells kernels of each row: `grad_of(row, at)` is its word of ScheduleArgs.
  template <class GradOf>
  void schedule(const Rows& rows, const std::vector<Hyperparameters>& hypers,
                const Signals& signals, int64_t purpose, const GradOf& grad_of, void* stream);
  template <class Kernels>
  void run(void* stream);
  void load_kernels(const Geometry& geometry) const;

  Rule rule_;
  int32_t index_;
  int32_t device_;
  int64_t version_ = -1;
  Geometry geometry_;
  std::shared_ptr<const DeviceTables> tables_;
};

}  // namespace ranger::cuda
