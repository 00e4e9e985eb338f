#include "launch.h"

#include <algorithm>

#include "kernels.h"
#include "runtime.h"

namespace ranger::cuda {

struct Launcher::DeviceTables {
  DeviceMemory rows, scalars, chunks, layouts;
};

namespace {

template <typename Record>
DeviceMemory on_device(const std::vector<Record>& records) {
  if (records.empty()) return {};
  DeviceMemory memory(records.size() * sizeof(Record));
  memory.fill_from(records.data(), records.size() * sizeof(Record));
  return memory;
}

// The words of a strided row's layout: see strided_offset().
void append_layout(std::vector<int64_t>& words, const Layout& layout) {
  const size_t ndim = layout.sizes.size();
  words.push_back(static_cast<int64_t>(ndim));
  words.insert(words.end(), layout.sizes.begin(), layout.sizes.end());
  Strides consecutive(ndim);
  int64_t stride = 1;
  for (size_t dim = ndim; dim-- > 0; stride *= layout.sizes[dim]) consecutive[dim] = stride;
  for (const Strides& strides : layout.strides) {
    const Strides& of_stream = strides.empty() ? consecutive : strides;
    words.insert(words.end(), of_stream.begin(), of_stream.end());
  }
}

template <typename T, bool kStrided, int kTier>
void launch_radam(const Launch& launch, const Tables& tables, const std::vector<void*>& grads,
                  void* stream) {
  constexpr int kCapacity = kGradTiers[kTier];
  if constexpr (!kStrided && kTier + 1 < static_cast<int>(std::size(kGradTiers))) {
    if (launch.row_count > kCapacity) {
      launch_radam<T, kStrided, kTier + 1>(launch, tables, grads, stream);
      return;
    }
  }
  StepArgs<kCapacity> args = {tables, launch.first_row, {}};
  std::copy_n(grads.begin() + launch.first_row, launch.row_count, args.grads);
  cuda::launch<RadamKernel<T, kStrided, kCapacity>>(launch.chunk_count, stream, args);
}

// Calls the one of four that is for the launch's kind.
template <class F32, class F32Strided, class F64, class F64Strided>
void by_kind(const Launch& launch, F32 f32, F32Strided f32_strided, F64 f64,
             F64Strided f64_strided) {
  if (launch.dtype == DType::kFloat64) {
    launch.strided ? f64_strided() : f64();
  } else {
    launch.strided ? f32_strided() : f32();
  }
}

}  // namespace

void Launcher::prepare(const Rows& rows) {
  if (version_ == rows.version) return;
  const DeviceGuard guard(device_);
  require<ScheduleKernel>();
  Geometry geometry = make_geometry(rows.rows, index_, grad_capacity());
  std::vector<int64_t> layouts;
  std::vector<int64_t> layout_of;
  for (int32_t i : geometry.order) {
    const Layout* const layout = rows.rows[i].layout.get();
    layout_of.push_back(layout == nullptr ? -1 : static_cast<int64_t>(layouts.size()));
    if (layout != nullptr) append_layout(layouts, *layout);
  }
  auto tables = std::make_shared<DeviceTables>();
  tables->layouts = on_device(layouts);
  std::vector<DeviceRow> records;
  for (size_t at = 0; at < geometry.order.size(); ++at) {
    const TensorRow& row = rows.rows[geometry.order[at]];
    DeviceRow record = {};
    std::copy(row.data.begin(), row.data.end(), record.data);
    record.data[kGrad] = nullptr;
    record.numel = row.numel;
    record.step = row.step;
    if (layout_of[at] >= 0) {
      record.layout = static_cast<const int64_t*>(tables->layouts.get()) + layout_of[at];
    }
    record.group = row.group;
    record.is_float64 = row.dtype == DType::kFloat64;
    records.push_back(record);
  }
  tables->rows = on_device(records);
  tables->scalars = on_device(std::vector<RowScalars>(records.size()));
  tables->chunks = on_device(geometry.chunks);
  geometry.chunks = {};  // the device has them now
  geometry_ = std::move(geometry);
  tables_ = std::move(tables);
  version_ = rows.version;
}

Tables Launcher::tables(int64_t first_chunk) const {
  return {static_cast<const DeviceRow*>(tables_->rows.get()),
          static_cast<RowScalars*>(tables_->scalars.get()),
          static_cast<const ChunkRef*>(tables_->chunks.get()) + first_chunk};
}

void Launcher::launch(const Rows& rows, const std::vector<Hyperparameters>& hypers,
                      const Signals& signals, void* stream) {
  const DeviceGuard guard(device_);
  keep_while_captured(stream, tables_);
  schedule(rows, hypers, signals, stream);
  rule_ == Rule::kRadam ? radam(rows, stream) : pass<Interpolation>(stream);
}

void Launcher::schedule(const Rows& rows, const std::vector<Hyperparameters>& hypers,
                        const Signals& signals, void* stream) {
  for (const ScheduleLaunch& launch : geometry_.schedules) {
    ScheduleArgs args = {};
    args.tables = tables(0);
    args.first_row = launch.first_row;
    args.row_count = launch.row_count;
    args.first_group = launch.first_group;
    args.grad_scale = signals.grad_scale;
    args.found_inf = signals.found_inf;
    args.norm = signals.norm;
    for (int32_t i = 0; i < launch.row_count; ++i) {
      const TensorRow& row = rows.rows[geometry_.order[launch.first_row + i]];
      args.groups[row.group - launch.first_group] = {hypers[row.group], signals.lr[row.group]};
      if (row.active) args.active[i / 32] |= 1u << (i % 32);
    }
    cuda::launch<ScheduleKernel>((launch.row_count + kThreads - 1) / kThreads, stream, args);
  }
}

void Launcher::radam(const Rows& rows, void* stream) {
  std::vector<void*> grads;
  for (int32_t i : geometry_.order) {
    grads.push_back(rows.rows[i].active ? rows.rows[i].data[kGrad] : nullptr);
  }
  for (const Launch& launch : geometry_.steps) {
    const Tables at = tables(launch.first_chunk);
    by_kind(
        launch, [&] { launch_radam<float, false, 0>(launch, at, grads, stream); },
        [&] { launch_radam<float, true, kStridedTier>(launch, at, grads, stream); },
        [&] { launch_radam<double, false, 0>(launch, at, grads, stream); },
        [&] { launch_radam<double, true, kStridedTier>(launch, at, grads, stream); });
  }
}

template <class Pass>
void Launcher::pass(void* stream) {
  for (const Launch& launch : geometry_.passes) {
    const PassArgs args = {tables(launch.first_chunk)};
    const int64_t blocks = launch.chunk_count;
    by_kind(
        launch, [&] { cuda::launch<SlowKernel<float, false, Pass>>(blocks, stream, args); },
        [&] { cuda::launch<SlowKernel<float, true, Pass>>(blocks, stream, args); },
        [&] { cuda::launch<SlowKernel<double, false, Pass>>(blocks, stream, args); },
        [&] { cuda::launch<SlowKernel<double, true, Pass>>(blocks, stream, args); });
  }
}

void Launcher::swap(void* stream) {
  const DeviceGuard guard(device_);
  keep_while_captured(stream, tables_);
  pass<Swap>(stream);
}

}  // namespace ranger::cuda
