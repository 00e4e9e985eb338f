#include "rows.h"

#include <algorithm>

namespace ranger {

int64_t count_elements(const Shape& shape) {
  int64_t count = 1;
  for (int32_t dim = 0; dim < shape.ndim; ++dim) count *= shape.sizes[dim];
  return count;
}

bool is_row_major(const Shape& shape) {
  int64_t expected = 1;
  for (int32_t dim = shape.ndim; dim-- > 0;) {
    if (shape.sizes[dim] == 1) continue;
    if (shape.strides[dim] != expected) return false;
    expected *= shape.sizes[dim];
  }
  return true;
}

std::vector<int32_t> row_major_order(const Shape& shape) {
  std::vector<int32_t> order;
  for (int32_t dim = 0; dim < shape.ndim; ++dim) {
    if (shape.sizes[dim] != 1) order.push_back(dim);
  }
  return order;
}

std::vector<int32_t> memory_order(const Shape& shape) {
  std::vector<int32_t> order = row_major_order(shape);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return shape.strides[a] > shape.strides[b]; });
  return order;
}

std::vector<int64_t> ordered_sizes(const Shape& shape, const std::vector<int32_t>& order) {
  std::vector<int64_t> sizes;
  for (int32_t dim : order) sizes.push_back(shape.sizes[dim]);
  return sizes;
}

Strides ordered_strides(const Shape& shape, const std::vector<int32_t>& order) {
  Strides strides(order.size());
  bool consecutive = true;
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[i] = shape.strides[order[i]];
    consecutive = consecutive && strides[i] == expected;
    expected *= shape.sizes[order[i]];
  }
  if (consecutive) strides.clear();
  return strides;
}

bool is_disjoint(const Shape& shape) {
  int64_t reach = 0;  // of the dimensions so far, beyond the first element
  const std::vector<int32_t> order = memory_order(shape);
  for (size_t i = order.size(); i-- > 0;) {
    const int64_t stride = shape.strides[order[i]];
    if (stride <= reach) return false;
    reach += (shape.sizes[order[i]] - 1) * stride;
  }
  return true;
}

int64_t extent(const TensorRow& row, int tensor) {
  if (row.data[tensor] == nullptr) return 0;
  const int64_t item = info_of(stored(row, tensor)).item_size;
  if (is_grouped(row, tensor)) return (row.numel + kGroup - 1) / kGroup * item;
  if (row.numel == 0 || row.layout == nullptr || row.layout->strides[tensor].empty()) {
    return row.numel * item;
  }
  int64_t last = 0;
  for (size_t dim = 0; dim < row.layout->sizes.size(); ++dim) {
    last += (row.layout->sizes[dim] - 1) * row.layout->strides[tensor][dim];
  }
  return (last + 1) * item;
}

}  // namespace ranger
