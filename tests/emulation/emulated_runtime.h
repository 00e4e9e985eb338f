// Stands in for csrc/cuda/runtime.h where there is no GPU: the memory is the host's, and a launch
// runs every thread of every block, each CUDA thread as a host thread of its own. Sanitizers then
// see what the kernels do: an index too far (address, undefined), a missing barrier (thread).
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda/device_guard.h"
#include "cuda/error.h"
#include "cuda/tables.h"

namespace ranger::cuda {

// A thread's current context, and how often each device's primary one is retained. As in CUDA, what
// needs a context and finds none makes one on device 0.
struct Driver {
  static constexpr int kDevices = 4;
  static inline thread_local void* context = nullptr;
  static inline std::atomic<int> retained[kDevices] = {};

  static void* primary(int32_t device) { return &retained[device]; }
  static void* current() { return context; }
  static int32_t device() {
    return static_cast<int32_t>(static_cast<std::atomic<int>*>(context) - retained);
  }
  static void enter(int32_t device) {
    ++retained[device];
    context = primary(device);
  }
  static void leave(int32_t device, void* before) {
    context = before;
    --retained[device];
  }
  // The device of a call that needs a context.
  static int32_t need() {
    if (context == nullptr) enter(0);
    return device();
  }
};

using DeviceGuard = BasicDeviceGuard<Driver>;

class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(size_t size) : memory_(static_cast<char*>(std::malloc(size))) {
    std::memset(memory_.get(), 0xff, size);  // nothing may count on zeros
    Driver::need();
  }
  void* get() const { return memory_.get(); }
  void fill_from(const void* host, size_t size) const { std::memcpy(memory_.get(), host, size); }

 private:
  struct Free {
    void operator()(char* memory) const {
      Driver::need();
      std::free(memory);
    }
  };
  std::unique_ptr<char, Free> memory_;
};

inline void keep_while_captured(void*, const std::shared_ptr<const void>&) {}
// RANGER_CUDA_TIER: a launch may take fewer gradients than a real one, so that a few make many.
#if !defined(RANGER_CUDA_TIER)
#define RANGER_CUDA_TIER kTierOf4KiB
#endif
inline int32_t largest_tier() { return RANGER_CUDA_TIER; }

class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t round = round_;
    if (++waiting_ == count_) {
      waiting_ = 0;
      ++round_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int count_;
  int waiting_ = 0;
  uint64_t round_ = 0;
};

class EmulatedThread {
 public:
  EmulatedThread(int index, int64_t block, Barrier& barrier, uint32_t* told)
      : index_(index), block_(block), barrier_(barrier), told_(told) {}
  int index() const { return index_; }
  int64_t block() const { return block_; }
  void barrier() const { barrier_.wait(); }
  // Each block is one group's threads, which ask together.
  uint32_t largest_of(uint32_t value) const {
    static_assert(kThreads == 4);
    told_[index_] = value;
    barrier();
    const uint32_t largest = *std::max_element(told_, told_ + kThreads);
    barrier();
    return largest;
  }

 private:
  int index_;
  int64_t block_;
  Barrier& barrier_;
  uint32_t* told_;  // of each thread
};

template <class Kernel>
void require() {}

inline thread_local int32_t launched_on = -1;  // the device of the last launch; -1: none

template <class Kernel>
void launch(int64_t blocks, void*, const typename Kernel::Args& args) {
  launched_on = Driver::need();
  if (blocks < 1 || blocks > INT32_MAX) throw Error("cudaLaunchKernel: invalid configuration");
  Barrier barrier(kThreads);
  uint32_t told[kThreads];
  // Each block has shared memory of its own, with rubbish in it, as on a GPU.
  std::vector<typename Kernel::Shared> shared(blocks);
  std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(shared[0]));
  std::vector<std::thread> threads;
  for (int index = 0; index < kThreads; ++index) {
    threads.emplace_back([&, index] {
      for (int64_t block = 0; block < blocks; ++block) {
        Kernel::run(EmulatedThread(index, block, barrier, told), args, shared[block]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace ranger::cuda
