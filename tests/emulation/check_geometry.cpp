// Makes the launches of a model that fits no memory here, and checks that they take each chunk of
// each row once, as the kernels do. In: the device, the largest tier of a schedule's arguments, and
// then for each tensor its elements, group, device, whether it is float64, and whether it is
// strided. Out: a summary as JSON; or what is wrong, and exit status 1.
#include <cstdint>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/geometry.h"
#include "cuda/kernels.h"

namespace ranger::cuda {
namespace {

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// Takes what each block of each launch would.
class Coverage {
 public:
  Coverage(const std::vector<TensorRow>& rows, const Geometry& geometry)
      : rows_(rows), geometry_(geometry), taken_(geometry.chunks.size()) {
    for (int32_t row : geometry.order) first_.push_back(first_.back() + chunks_of(rows[row].numel));
    require(first_.back() == static_cast<int64_t>(taken_.size()), "too many or too few chunks");
  }

  void take(const std::vector<Launch>& launches) {
    taken_.assign(taken_.size(), false);
    for (const Launch& launch : launches) {
      require(launch.chunk_count > 0 && launch.chunk_count <= INT32_MAX, "no valid grid");
      for (int64_t block = 0; block < launch.chunk_count; ++block) take(launch, block);
    }
    for (bool taken : taken_) require(taken, "a chunk is left out");
  }

 private:
  static int64_t chunks_of(int64_t numel) { return numel / kChunkSize + (numel % kChunkSize != 0); }

  void take(const Launch& launch, int64_t block) {
    const ChunkRef& chunk = geometry_.chunks.at(launch.first_chunk + block);
    const TensorRow& row = rows_[geometry_.order.at(chunk.row)];
    require(row.format == launch.format && is_strided(row) == launch.strided,
            "another kind of row");
    const Span span = span_of(chunk, row.numel);
    require(span.begin % kChunkSize == 0 && span.begin >= 0, "a chunk between two");
    require(span.count > 0 && span.count <= kChunkSize, "a chunk of no valid size");
    const bool is_last = span.begin + kChunkSize >= row.numel;
    require(span.count == (is_last ? row.numel - span.begin : kChunkSize), "a part of a chunk");
    std::vector<bool>::reference taken = taken_.at(first_[chunk.row] + span.begin / kChunkSize);
    require(!taken, "a chunk is taken twice");
    taken = true;
  }

  const std::vector<TensorRow>& rows_;
  const Geometry& geometry_;
  std::vector<int64_t> first_ = {0};  // of each row's chunks
  std::vector<bool> taken_;
};

void check_order(const std::vector<TensorRow>& rows, const Geometry& geometry, int32_t device) {
  std::vector<bool> found(rows.size());
  for (int32_t row : geometry.order) {
    require(rows.at(row).launcher == device && !found[row],
            "a row of another device, or a row twice");
    found[row] = true;
  }
  for (size_t row = 0; row < rows.size(); ++row) {
    require(found[row] || rows[row].launcher != device, "a row is left out");
  }
}

void check_schedules(const std::vector<TensorRow>& rows, const Geometry& geometry, int32_t words) {
  int64_t next = 0;
  for (const ScheduleLaunch& launch : geometry.schedules) {
    require(launch.first_row == next && launch.row_count > 0, "a schedule left out or twice");
    require(launch.group_count * kGroupWords + launch.row_count <= words, "too many arguments");
    next += launch.row_count;
    for (int64_t row = launch.first_row; row < next; ++row) {
      const int32_t group = rows[geometry.order.at(row)].group - launch.first_group;
      require(group >= 0 && group < launch.group_count, "a group outside of the arguments");
    }
  }
  require(next == static_cast<int64_t>(geometry.order.size()), "a row without a schedule");
}

void run() {
  int32_t device, tier;
  require(static_cast<bool>(std::cin >> device >> tier), "no device and tier");
  const int32_t words = kScheduleTiers[tier];
  std::vector<TensorRow> rows;
  TensorRow row;
  bool is_float64, strided;
  while (std::cin >> row.numel >> row.group >> row.launcher >> is_float64 >> strided) {
    row.format = is_float64 ? FormatId::kFloat64 : FormatId::kFloat32;
    auto layout = std::make_shared<Layout>();
    layout->sizes = {row.numel};
    layout->strides[kGrad] = {2};
    row.layout = strided ? layout : nullptr;
    rows.push_back(row);
  }
  const Geometry geometry = make_geometry(rows, device, words);
  check_order(rows, geometry, device);
  check_schedules(rows, geometry, words);
  Coverage(rows, geometry).take(geometry.launches);
  std::cout << "{\"rows\": " << geometry.order.size() << ", \"chunks\": " << geometry.chunks.size()
            << ", \"schedules\": " << geometry.schedules.size()
            << ", \"launches\": " << geometry.launches.size() << "}\n";
}

}  // namespace
}  // namespace ranger::cuda

int main() {
  try {
    ranger::cuda::run();
  } catch (const std::exception& error) {
    std::cout << error.what() << "\n";
    return 1;
  }
}
