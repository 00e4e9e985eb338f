// What check_kernels.cpp steps: memory twice over, and random parameters in it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/runtime.h"

namespace ranger {
namespace {

// --- memory ------------------------------------------------------------------------------------

// Around every buffer; AddressSanitizer has better ones of its own.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = 64;
#endif

// What the kernels work on, and next to it what the plain loop makes of the same bytes.
class Buffer {
 public:
  Buffer() = default;
  // `offset` bytes from a 16-byte boundary.
  Buffer(size_t offset, size_t size)
      : start_(kGuard + offset), memory_(new char[start_ + size + kGuard]) {
    expected_.assign(start_ + size + kGuard, '\xa5');
    publish();
  }

  explicit operator bool() const { return memory_ != nullptr; }
  char* data() const { return memory_.get() + start_; }
  char* expected() { return expected_.data() + start_; }
  // The kernels are to see what was put into expected().
  void publish() { std::copy(expected_.begin(), expected_.end(), memory_.get()); }

  std::string difference() const {
    for (size_t i = 0; i < expected_.size(); ++i) {
      if (memory_[i] == expected_[i]) continue;
      return "byte " + std::to_string(static_cast<int64_t>(i) - static_cast<int64_t>(start_)) +
             " of " + std::to_string(expected_.size() - start_ - kGuard) + " is " +
             std::to_string(memory_[i]) + ", not " + std::to_string(expected_[i]);
    }
    return "";
  }

 private:
  size_t start_ = 0;
  std::unique_ptr<char[]> memory_;
  std::vector<char> expected_;
};

// Where the elements of a stream lie, in elements, counted up like an odometer.
std::vector<int64_t> element_offsets(const TensorRow& row, int stream) {
  static const Layout kConsecutive;
  const Layout& layout = row.layout ? *row.layout : kConsecutive;
  std::vector<int64_t> offsets;
  const Strides& strides = layout.strides[stream];
  std::vector<int64_t> digits(layout.sizes.size(), 0);
  int64_t offset = 0;
  for (int64_t i = 0; i < row.numel; ++i) {
    offsets.push_back(strides.empty() ? i : offset);
    for (size_t dim = layout.sizes.size(); !strides.empty() && dim-- > 0;) {
      offset += strides[dim];
      if (++digits[dim] < layout.sizes[dim]) break;
      offset -= strides[dim] * layout.sizes[dim];
      digits[dim] = 0;
    }
  }
  return offsets;
}

// --- a plan ------------------------------------------------------------------------------------

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}

  int64_t below(int64_t bound) {
    return std::uniform_int_distribution<int64_t>(0, bound - 1)(engine_);
  }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <typename T>
  T of(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<int64_t>(choices.size()))];
  }
  // Over many decades, zeros and denormals of float32 among them.
  double number() {
    if (one_in(30)) return 0.0;
    const double value = std::normal_distribution<double>()(engine_);
    return one_in(30) ? value * 1e-39 : value * std::pow(10.0, static_cast<double>(below(7)) - 4);
  }

 private:
  std::mt19937 engine_;
};

// Dimensions in another order, with gaps, or, of gradients only, over the same memory again.
Strides draw_strides(Random& random, const Layout& layout, bool may_expand) {
  Strides strides(layout.sizes.size());
  std::vector<size_t> order;
  for (size_t dim = 0; dim < layout.sizes.size(); ++dim) {
    order.insert(order.begin() + random.below(static_cast<int64_t>(dim) + 1), dim);
  }
  int64_t stride = 1 + random.below(3);
  for (size_t dim : order) {
    strides[dim] = stride;
    stride = stride * layout.sizes[dim] + random.below(2);
  }
  if (may_expand && random.one_in(2)) strides[random.below(static_cast<int64_t>(order.size()))] = 0;
  return strides;
}

struct Parameter {
  std::array<Buffer, kStreams> streams;
  std::array<int64_t, kStreams> misalignment;  // elements after a 16-byte boundary
  Buffer step;
};

struct Case {
  const char* name;
  int rows;
  int groups;
  int steps;
  bool mixed;         // data types and devices
  int64_t strided;    // of 3 rows
  int64_t max_numel;  // of consecutive rows
};

constexpr const char* kStreamNames[] = {"param",      "grad",       "exp_avg",
                                        "exp_avg_sq", "slow_param", "outer_momentum_buffer"};

// What calls are to leave as it is: the thread's current context, which is none in every fourth
// step and other devices' in the others, and how many hold on to each device's.
class Devices {
 public:
  explicit Devices(int step) {
    cuda::Driver::context = step % 4 == 0 ? nullptr : cuda::Driver::primary(step % 4 - 1);
    before_ = cuda::Driver::context;
    cuda::launched_on = -1;
  }

  std::string difference(int32_t device) const {
    if (cuda::launched_on != device && cuda::launched_on != -1) return "a launch on another device";
    if (cuda::Driver::context != before_) return "another context is current than before";
    for (const auto& retained : cuda::Driver::retained) {
      if (retained != 0) return "a context is kept";
    }
    return "";
  }

 private:
  void* before_;
};

}  // namespace
}  // namespace ranger
