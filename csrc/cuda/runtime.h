// The CUDA runtime as far as a launcher needs it: every result checked, nothing that synchronises
// with a stream of the user's, and nothing that a capture under way would forbid or record.
#pragma once

#if defined(RANGER_EMULATE_CUDA)
#include "emulated_runtime.h"
#else

#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <string>

#include "device_guard.h"
#include "error.h"
#include "tables.h"

namespace ranger::cuda {

std::string describe_error(const char* call, cudaError_t error);

// Throws an Error that names the call, unless `error` is success.
void check(cudaError_t error, const char* call);

// The calling thread's context, as CUDA's driver has it.
struct Driver {
  static void* current();   // null: there is none
  static int32_t device();  // of the current one
  // Makes the device's primary context current, which lives until leave().
  static void enter(int32_t device);
  static void leave(int32_t device, void* before) noexcept;
};

using DeviceGuard = BasicDeviceGuard<Driver>;

// Memory on the current device, of its own and filled from the host. Not torch's allocator's: a
// captured graph may hold it.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(size_t size);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept;
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;

  void* get() const { return memory_; }
  // Returns when the bytes are there.
  void fill_from(const void* host, size_t size) const;

 private:
  void* memory_ = nullptr;
};

// If `stream` is being captured, `tables` live as long as the graph and all that is made of it.
void keep_while_captured(void* stream, const std::shared_ptr<const void>& tables);

// Which of kScheduleTiers is the largest that this driver takes.
int32_t largest_tier();

#if defined(__CUDACC__)

// Where a thread is.
struct DeviceThread {
  __device__ __forceinline__ int index() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int64_t block() const { return blockIdx.x; }
  __device__ __forceinline__ void barrier() const { __syncthreads(); }
  // Of what four threads side by side have; the whole warp asks.
  __device__ __forceinline__ uint32_t largest_of(uint32_t value) const {
    constexpr unsigned kAll = 0xffffffffu;
    value = max(value, __shfl_xor_sync(kAll, value, 1));
    return max(value, __shfl_xor_sync(kAll, value, 2));
  }
};

template <class Kernel>
__global__ void __launch_bounds__(kThreads, Kernel::kLeastBlocks)
    entry(const __grid_constant__ typename Kernel::Args args) {
  __shared__ typename Kernel::Shared shared;
  Kernel::run(DeviceThread(), args, shared);
}

// Throws unless this build has machine code, or PTX, for the current device.
template <class Kernel>
void require() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, entry<Kernel>), "cudaFuncGetAttributes");
}

template <class Kernel>
void launch(int64_t blocks, void* stream, const typename Kernel::Args& args) {
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&args))};
  check(cudaLaunchKernel(entry<Kernel>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                         arguments, 0, static_cast<cudaStream_t>(stream)),
        "cudaLaunchKernel");
}

#endif

}  // namespace ranger::cuda

#endif
