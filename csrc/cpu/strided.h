// Elements that do not lie next to each other, taken together for a kernel and put back after it.
#pragma once

#include <cstdint>
#include <vector>

namespace ranger::cpu {

// Calls visit(i, offset) for elements begin .. begin + count - 1: i counts from 0, offset is where
// the element lies, in elements.
template <typename Visit>
void for_each_offset(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     int64_t begin, int64_t count, Visit visit) {
  const int ndim = static_cast<int>(sizes.size());
  std::vector<int64_t> index(ndim);
  int64_t rest = begin;
  int64_t offset = 0;
  for (int dim = ndim - 1; dim >= 0; --dim) {
    index[dim] = rest % sizes[dim];
    rest /= sizes[dim];
    offset += index[dim] * strides[dim];
  }
  for (int64_t i = 0; i < count; ++i) {
    visit(i, offset);
    for (int dim = ndim - 1; dim >= 0; --dim) {
      offset += strides[dim];
      if (++index[dim] < sizes[dim]) break;
      offset -= strides[dim] * sizes[dim];
      index[dim] = 0;
    }
  }
}

}  // namespace ranger::cpu
