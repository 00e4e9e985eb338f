// What the host and the kernels tell each other. Plain records of 8-byte fields: the tables stay on
// the device from step to step, and arguments travel with a launch.
#pragma once

#include <cstdint>

#include "../formats/rows.h"
#include "../rule/random.h"
#include "../rule/schedule.h"

namespace ranger::cuda {

// Measured choices (benchmarks/README.md), and what the emulation on the CPU makes smaller.
#if !defined(RANGER_CUDA_THREADS)
#define RANGER_CUDA_THREADS 256
#endif
#if !defined(RANGER_CUDA_CHUNK)
#define RANGER_CUDA_CHUNK 8192
#endif
#if !defined(RANGER_CUDA_PACKS)
#define RANGER_CUDA_PACKS 2
#endif
#if !defined(RANGER_CUDA_BLOCKS)
#define RANGER_CUDA_BLOCKS 4
#endif
constexpr int kThreads = RANGER_CUDA_THREADS;      // of a block
constexpr int64_t kChunkSize = RANGER_CUDA_CHUNK;  // elements of a block
constexpr int kPacks = RANGER_CUDA_PACKS;          // 16-byte loads of a thread from each stream
constexpr int kBlocks = RANGER_CUDA_BLOCKS;        // side by side on a multiprocessor, at least

// Threads that sum a slice together, and slices of a block, where gradients are centralized.
constexpr int kTeam = kThreads < 64 ? kThreads / 2 : 32;
constexpr int kSlices = kThreads / kTeam;

// --- on the device from step to step -----------------------------------------------------------

struct DeviceRow {
  void* data[kTensors];  // kGrad: not used, gradients are of a step
  int64_t numel;
  float* step;
  const int64_t* layout;  // nullptr: all streams are consecutive; otherwise see strided_offset()
  int64_t first;          // of its elements, in the whole parameter that it is a shard of
  int64_t slice;          // see TensorRow; 0: gradients are not centralized
  int64_t scratch;        // where those that are begin, in bytes from the first of all
  int32_t group;
  int16_t is_float64;  // its arithmetic
  int16_t grad_dtype;  // DType
  int32_t place;       // counted through the groups
  int32_t codec;       // CodecId of the parameter
};

// A block's work: elements [index * kChunkSize, ...) of a row, or slices [index * kSlices, ...).
struct ChunkRef {
  int32_t row;
  int32_t index;
};

// What the schedule kernel writes for a row and the other kernels of the step read: flags, where
// the gradient is, the scalars in the type of the row's arithmetic, and the keys of random bits.
constexpr int64_t kActive = 1, kRectified = 2, kL2 = 4, kSync = 8, kOuter = 16, kBounded = 32;

struct RowScalars {
  int64_t flags;
  const void* grad;
  union {
    Coefficients<float> f32;
    Coefficients<double> f64;
  };
  RandomKeys keys;
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

// What a launch of the schedule kernel is for: a step, a pull after another optimizer's step, or
// telling kernels that come before the step where gradients are.
constexpr int64_t kForStep = 0, kForPull = 1, kForGradients = 2;

// Arguments of the schedule kernel for consecutive rows. Gradients move from step to step, so their
// addresses travel with the launch: nothing is copied, and a captured graph holds nothing that can
// go stale. A launch pays for all of its arguments' bytes, so there are tiers: 512 bytes; the 4 KiB
// that every driver takes; and up to the 32,764 bytes of CUDA 12.1 and driver R530 on.
struct ScheduleHeader {
  Tables tables;
  int32_t first_row;
  int32_t row_count;
  int32_t first_group;
  int32_t group_count;
  DeviceScalar grad_scale;  // GradScaler's loss scale; none: 1
  DeviceScalar found_inf;   // not 0: nothing moves in this step
  DeviceScalar norm;        // of all gradients; read where a group clips
  int64_t purpose;
};

constexpr int kHeaderWords = sizeof(ScheduleHeader) / 8;
constexpr int kGroupWords = sizeof(GroupArgs) / 8;
constexpr int kScheduleTiers[] = {64 - kHeaderWords, 512 - kHeaderWords, 1024 - kHeaderWords,
                                  2048 - kHeaderWords, 4095 - kHeaderWords};

template <int kWords>
struct ScheduleArgs {
  ScheduleHeader header;
  // GroupArgs of each group, then a word for each row: the address of its gradient. 0: it does not
  // move; kNoGrad: it has none to read.
  uint64_t words[kWords];
};
constexpr uint64_t kNoGrad = 1;
constexpr int kTierOf4KiB = 1;
static_assert(sizeof(ScheduleArgs<kScheduleTiers[kTierOf4KiB]>) == 4096);
static_assert(sizeof(ScheduleArgs<kScheduleTiers[4]>) <= 32764);

// Arguments of all other kernels.
struct StepArgs {
  Tables tables;
};

}  // namespace ranger::cuda
