// What a launch reads and writes: the tensors of each parameter, as they lie in this step. Knows
// neither Python nor a device.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "formats.h"

namespace ranger {

// What is done to a parameter that moves: the fused step, or the Lookahead interpolation alone.
enum class Rule : int8_t { kRadam, kLookahead };

// A stride for each dimension, in elements. Empty: the elements are consecutive.
using Strides = std::vector<int64_t>;

// How streams lie that are not all consecutive, in the order that the parameter's elements lie in:
// outermost dimension first, those of one element left out.
struct Layout {
  std::vector<int64_t> sizes;
  std::array<Strides, kTensors> strides;  // none for what has an element for each group

  bool operator==(const Layout& other) const {
    return sizes == other.sizes && strides == other.strides;
  }
};

// Of a row that no launcher has been given.
constexpr int32_t kNobody = -1;

struct TensorRow {
  std::array<void*, kTensors> data = {};  // nullptr: the parameter has no such stream
  float* step = nullptr;                  // its count of steps, where its kernels run
  int64_t numel = 0;
  int64_t first = 0;  // of its elements, in the whole parameter that it is a shard of
  // Gradients are centralized by the mean of each slice along the first dimension, of so many
  // elements, which come one after the other; 0: they are not.
  int64_t slice = 0;
  int32_t place = 0;  // counted through the groups
  int32_t group = 0;
  int32_t launcher = kNobody;  // whose kernels move it
  int8_t device_type = 0;      // where it lies, as DLPack counts
  FormatId format = FormatId::kFloat32;
  DType grad_dtype = DType::kFloat32;
  bool active = false;  // whether it moves in this step; if not, all is of its last
  std::shared_ptr<const Layout> layout;  // nullptr: every stream is consecutive
};

inline const CodecInfo& codec_of(const TensorRow& row, int stream) {
  return info_of(info_of(row.format).codecs[stream]);
}

// What the elements of a tensor are in memory.
inline DType stored(const TensorRow& row, int tensor) {
  if (tensor == kGrad) return row.grad_dtype;
  return tensor < kRestOf ? codec_of(row, tensor).stored : codec_of(row, tensor - kRestOf).rest;
}

// Whether a tensor has an element for each group of elements, and not for each.
inline bool is_grouped(const TensorRow& row, int tensor) {
  return tensor > kRestOf && codec_of(row, tensor - kRestOf).is_grouped;
}

// Whether the row's place is one of these, which are in order; if there are none, all are meant.
inline bool is_among(const TensorRow& row, const std::vector<int32_t>& places) {
  return places.empty() || std::binary_search(places.begin(), places.end(), row.place);
}

// The rows of an optimizer. `version` differs whenever anything but the gradients' addresses and
// what is active does: what a launcher derives from the rows lasts as long.
struct Rows {
  std::vector<TensorRow> rows;
  int64_t version = 0;
};

// A shape and its strides as a tensor has them, both of `ndim` elements.
struct Shape {
  int32_t ndim;
  const int64_t* sizes;
  const int64_t* strides;
};

int64_t count_elements(const Shape& shape);

// Whether the elements lie side by side, the last dimension's first.
bool is_row_major(const Shape& shape);

// Dimensions of more than one element: as they are, and in the order in which memory runs, largest
// stride first, so that a dense tensor of any permutation is consecutive.
std::vector<int32_t> row_major_order(const Shape& shape);
std::vector<int32_t> memory_order(const Shape& shape);

// The sizes in that order, and the strides: empty if the elements are consecutive.
std::vector<int64_t> ordered_sizes(const Shape& shape, const std::vector<int32_t>& order);
Strides ordered_strides(const Shape& shape, const std::vector<int32_t>& order);

// Whether it is certain that no two elements share memory.
bool is_disjoint(const Shape& shape);

// How many bytes lie between the first element of a tensor and the end of its last.
int64_t extent(const TensorRow& row, int tensor);

}  // namespace ranger
