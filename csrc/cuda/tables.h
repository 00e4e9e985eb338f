// What the host and the kernels tell each other. Plain records of 8-byte fields: the tables stay on
// the device from step to step, and arguments travel with a launch.
#pragma once

#include <cstdint>

#include "../rows.h"
#include "../schedule.h"

namespace ranger::cuda {

// Measured choices (benchmarks/README.md), and what the emulation on the CPU makes smaller.
#if !defined(RANGER_CUDA_THREADS)
#define RANGER_CUDA_THREADS 256
#endif
#if !defined(RANGER_CUDA_CHUNK)
#define RANGER_CUDA_CHUNK 8192
#endif
#if !defined(RANGER_CUDA_UNROLL)
#define RANGER_CUDA_UNROLL 1
#endif
constexpr int kThreads = RANGER_CUDA_THREADS;      // of a block
constexpr int64_t kChunkSize = RANGER_CUDA_CHUNK;  // elements of a block
constexpr int kUnroll = RANGER_CUDA_UNROLL;        // 16-byte accesses of a thread side by side

// --- on the device from step to step -----------------------------------------------------------

struct DeviceRow {
  void* data[kStreams];  // kGrad: not used, gradients are arguments
  int64_t numel;
  float* step;
  const int64_t* layout;  // nullptr: all streams are consecutive; otherwise see strided_offset()
  int32_t group;
  int32_t is_float64;
};

// A block's work: elements [index * kChunkSize, ...) of a row.
struct ChunkRef {
  int32_t row;
  int32_t index;
};

// What the schedule kernel writes for a row and the other kernels of the step read: flags, and the
// scalars in the type of the row's arithmetic.
constexpr int64_t kActive = 1, kRectified = 2, kL2 = 4, kSync = 8;

struct RowScalars {
  int64_t flags;
  union {
    Coefficients<float> f32;
    Coefficients<double> f64;
  };
};

// --- arguments of a launch ---------------------------------------------------------------------

// A number on the device, which the host never reads; float32 or float64.
struct DeviceScalar {
  const void* data = nullptr;
  int64_t is_float64 = 0;

  RANGER_HOST_DEVICE double read() const {
    return is_float64 ? *static_cast<const double*>(data)
                      : static_cast<double>(*static_cast<const float*>(data));
  }
};

struct Tables {
  const DeviceRow* rows;
  RowScalars* scalars;
  const ChunkRef* chunks;  // of this launch's first block
};

struct GroupArgs {
  Hyperparameters hyper;
  DeviceScalar lr;  // in place of hyper.lr, if there is one
};

// Below the 4 KiB that every driver takes.
constexpr int kScheduleGroups = 30;
constexpr int kScheduleRows = 8192;

struct ScheduleArgs {
  Tables tables;
  int32_t first_row;
  int32_t row_count;
  int32_t first_group;
  DeviceScalar grad_scale;  // GradScaler's loss scale; none: 1
  DeviceScalar found_inf;   // not 0: nothing moves in this step
  DeviceScalar norm;        // of all gradients; read where a group clips
  GroupArgs groups[kScheduleGroups];
  uint32_t active[kScheduleRows / 32];  // a bit for each row
};
static_assert(sizeof(ScheduleArgs) <= 4096);

// Gradients move from step to step, so their addresses travel with the launch: nothing is copied,
// and a captured graph holds nothing that can go stale. 32,764 bytes of arguments from CUDA 12.1
// and driver R530 on, 4 KiB before. A launch pays for all bytes, so small models take small ones.
constexpr int kGradTiers[] = {32, 480, 4080};
constexpr int kStridedTier = 1;  // the only one of strided rows, which are few

template <int kCapacity>
struct StepArgs {
  Tables tables;
  int64_t first_row;
  const void* grads[kCapacity];  // nullptr: the row does not move
};
static_assert(sizeof(StepArgs<kGradTiers[1]>) <= 4096);
static_assert(sizeof(StepArgs<kGradTiers[2]>) <= 32764);

}  // namespace ranger::cuda
