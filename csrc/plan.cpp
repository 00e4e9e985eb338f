#include "plan.h"

#include <algorithm>

namespace ranger {

std::vector<int32_t> memory_order(const Layout& layout) {
  std::vector<int32_t> order;
  for (int32_t dim = 0; dim < layout.ndim; ++dim) {
    if (layout.sizes[dim] != 1) order.push_back(dim);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return layout.strides[a] > layout.strides[b]; });
  return order;
}

std::vector<int64_t> ordered_sizes(const Layout& layout, const std::vector<int32_t>& order) {
  std::vector<int64_t> sizes;
  for (int32_t dim : order) sizes.push_back(layout.sizes[dim]);
  return sizes;
}

Strides ordered_strides(const Layout& layout, const std::vector<int32_t>& order) {
  Strides strides(order.size());
  bool consecutive = true;
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[i] = layout.strides[order[i]];
    consecutive = consecutive && strides[i] == expected;
    expected *= layout.sizes[order[i]];
  }
  if (consecutive) strides.clear();
  return strides;
}

int64_t count_elements(const Layout& layout) {
  int64_t count = 1;
  for (int32_t dim = 0; dim < layout.ndim; ++dim) count *= layout.sizes[dim];
  return count;
}

std::vector<Chunk> cut_into_chunks(const std::vector<TensorRow>& rows, int32_t chunk_size) {
  std::vector<Chunk> chunks;
  for (size_t row = 0; row < rows.size(); ++row) {
    if (rows[row].device != kCpu) continue;
    for (int64_t begin = 0; begin < rows[row].numel; begin += chunk_size) {
      const int64_t count = std::min<int64_t>(chunk_size, rows[row].numel - begin);
      chunks.push_back({static_cast<int32_t>(row), static_cast<int32_t>(count), begin});
    }
  }
  return chunks;
}

}  // namespace ranger
