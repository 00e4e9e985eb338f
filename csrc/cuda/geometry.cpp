#include "geometry.h"

#include <algorithm>
#include <tuple>

namespace ranger::cuda {
namespace {

bool same_kind(const TensorRow& a, const TensorRow& b) {
  return a.dtype == b.dtype && is_strided(a) == is_strided(b);
}

// Cuts `order` into launches of one kind and at most so many rows.
std::vector<Launch> cut_into_launches(const std::vector<TensorRow>& rows,
                                      const std::vector<int32_t>& order,
                                      const std::vector<int64_t>& first_chunks, int32_t capacity,
                                      int32_t strided_capacity) {
  std::vector<Launch> launches;
  const int32_t end = static_cast<int32_t>(order.size());
  for (int32_t first = 0; first < end;) {
    const TensorRow& row = rows[order[first]];
    const int32_t most = is_strided(row) ? strided_capacity : capacity;
    int32_t last = first + 1;
    while (last < end && last - first < most && same_kind(rows[order[last]], row)) ++last;
    const int64_t chunks = first_chunks[last] - first_chunks[first];
    if (chunks > 0) {
      launches.push_back(
          {row.dtype, is_strided(row), first, last - first, first_chunks[first], chunks});
    }
    first = last;
  }
  return launches;
}

std::vector<ScheduleLaunch> cut_into_schedules(const std::vector<TensorRow>& rows,
                                               const std::vector<int32_t>& order) {
  std::vector<ScheduleLaunch> launches;
  const int32_t end = static_cast<int32_t>(order.size());
  for (int32_t first = 0; first < end;) {
    const int32_t group = rows[order[first]].group;
    const auto fits = [&](int32_t i) {
      const int32_t of_row = rows[order[i]].group;
      return i - first < kScheduleRows && group <= of_row && of_row < group + kScheduleGroups;
    };
    int32_t last = first + 1;
    while (last < end && fits(last)) ++last;
    launches.push_back({first, last - first, group});
    first = last;
  }
  return launches;
}

}  // namespace

Geometry make_geometry(const std::vector<TensorRow>& rows, int32_t launcher, int32_t capacity) {
  Geometry geometry;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].launcher == launcher) geometry.order.push_back(static_cast<int32_t>(i));
  }
  std::stable_sort(geometry.order.begin(), geometry.order.end(), [&](int32_t a, int32_t b) {
    const auto kind = [&](int32_t i) { return std::tuple(rows[i].dtype, is_strided(rows[i])); };
    return kind(a) < kind(b);
  });
  std::vector<int64_t> first_chunks = {0};
  for (size_t at = 0; at < geometry.order.size(); ++at) {
    const int64_t numel = rows[geometry.order[at]].numel;
    for (int64_t begin = 0; begin < numel; begin += kChunkSize) {
      geometry.chunks.push_back(
          {static_cast<int32_t>(at), static_cast<int32_t>(begin / kChunkSize)});
    }
    first_chunks.push_back(static_cast<int64_t>(geometry.chunks.size()));
  }
  const int32_t all = std::max(static_cast<int32_t>(geometry.order.size()), 1);
  geometry.schedules = cut_into_schedules(rows, geometry.order);
  geometry.steps = cut_into_launches(rows, geometry.order, first_chunks, capacity,
                                     std::min(capacity, kGradTiers[kStridedTier]));
  geometry.passes = cut_into_launches(rows, geometry.order, first_chunks, all, all);
  return geometry;
}

}  // namespace ranger::cuda
