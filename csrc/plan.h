// What does not change from step to step: which tensors there are, how they lie in memory, and how
// the work is cut into chunks. Knows neither Python nor a device.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace ranger {

enum class DType : int8_t { kFloat32, kFloat64 };

constexpr int64_t item_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

// The tensors that belong to one parameter.
enum Stream : int { kParam, kGrad, kExpAvg, kExpAvgSq, kSlowParam, kStreams };

// How a stream's elements lie in memory, in the order that its parameter's elements lie in.
// Empty: consecutive. Otherwise the stride of each of TensorRow::sizes, in elements.
using Strides = std::vector<int64_t>;

// A row's device where the CPU's kernels move it, and where launches from Python do.
constexpr int32_t kCpu = -1;
constexpr int32_t kFromPython = -2;

struct TensorRow {
  int32_t device = kCpu;  // kFromPython, or the index of the CUDA device whose kernels move it
  int64_t numel = 0;
  DType dtype = DType::kFloat32;
  int32_t group = 0;
  float* step = nullptr;
  std::vector<int64_t> sizes;             // outermost first; dimensions of one element left out
  std::array<void*, kStreams> data = {};  // nullptr: the parameter has no such stream
  std::array<Strides, kStreams> strides;
};

// A shape and its strides as a tensor has them, both of `ndim` elements.
struct Layout {
  int32_t ndim;
  const int64_t* sizes;
  const int64_t* strides;
};

// The order in which the parameter's memory runs: dimensions of more than one element, largest
// stride first, so that a dense parameter of any permutation is consecutive.
std::vector<int32_t> memory_order(const Layout& layout);

// The sizes of `layout` in that order, and the strides: empty if the elements are consecutive.
std::vector<int64_t> ordered_sizes(const Layout& layout, const std::vector<int32_t>& order);
Strides ordered_strides(const Layout& layout, const std::vector<int32_t>& order);

int64_t count_elements(const Layout& layout);

// `count` elements of row `row`, from element `begin`.
struct Chunk {
  int32_t row;
  int32_t count;
  int64_t begin;
};

// Cuts the CPU's rows into chunks of at most `chunk_size` elements, in order, without overlap or
// gap.
std::vector<Chunk> cut_into_chunks(const std::vector<TensorRow>& rows, int32_t chunk_size);

}  // namespace ranger
