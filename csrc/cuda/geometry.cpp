#include "geometry.h"

#include <algorithm>
#include <tuple>

namespace ranger::cuda {
namespace {

constexpr int64_t kAlignment = 16;

std::tuple<FormatId, bool> kind_of(const TensorRow& row) { return {row.format, is_strided(row)}; }

std::vector<ScheduleLaunch> cut_into_schedules(const std::vector<TensorRow>& rows,
                                               const std::vector<int32_t>& order, int32_t words) {
  std::vector<ScheduleLaunch> launches;
  for (int32_t i = 0; i < static_cast<int32_t>(order.size()); ++i) {
    const int32_t group = rows[order[i]].group;
    if (!launches.empty()) {
      ScheduleLaunch with = launches.back();
      const int32_t end = std::max(with.first_group + with.group_count, group + 1);
      with.first_group = std::min(with.first_group, group);
      with.group_count = end - with.first_group;
      ++with.row_count;
      if (with.words() <= words) {
        launches.back() = with;
        continue;
      }
    }
    launches.push_back({i, 1, group, 1});
  }
  return launches;
}

}  // namespace

Geometry make_geometry(const std::vector<TensorRow>& rows, int32_t launcher, int32_t words) {
  Geometry geometry;
  std::vector<int32_t>& order = geometry.order;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].launcher == launcher) order.push_back(static_cast<int32_t>(i));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return kind_of(rows[a]) < kind_of(rows[b]); });
  const TensorRow* before = nullptr;
  for (size_t at = 0; at < order.size(); ++at) {
    const TensorRow& row = rows[order[at]];
    if (before == nullptr || kind_of(*before) != kind_of(row)) {
      const auto first = static_cast<int64_t>(geometry.chunks.size());
      geometry.launches.push_back({row.format, is_strided(row), false, first, 0});
    }
    before = &row;
    Launch& launch = geometry.launches.back();
    launch.has_slow = launch.has_slow || row.data[kSlowParam] != nullptr;
    for (int64_t begin = 0; begin < row.numel; begin += kChunkSize, ++launch.chunk_count) {
      geometry.chunks.push_back(
          {static_cast<int32_t>(at), static_cast<int32_t>(begin / kChunkSize)});
    }
    geometry.scratch.push_back(geometry.scratch_size);
    if (row.slice == 0) continue;
    for (int64_t first = 0; first < row.numel / row.slice; first += kSlices) {
      geometry.slices.push_back({static_cast<int32_t>(at), static_cast<int32_t>(first / kSlices)});
    }
    const int64_t bytes = row.numel * info_of(info_of(row.format).value).item_size;
    geometry.scratch_size += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  const auto is_empty = [](const Launch& launch) { return launch.chunk_count == 0; };
  auto& launches = geometry.launches;
  launches.erase(std::remove_if(launches.begin(), launches.end(), is_empty), launches.end());
  geometry.schedules = cut_into_schedules(rows, order, words);
  return geometry;
}

}  // namespace ranger::cuda
