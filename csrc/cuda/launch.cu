#include "launch.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "centralize_kernel.h"
#include "norm_kernels.h"
#include "runtime.h"
#include "wide_kernels.h"

namespace ranger::cuda {

struct RowTable {
  DeviceMemory layouts, rows;
};

struct Launcher::DeviceTables {
  explicit DeviceTables(int32_t device) : device(device) {}
  ~DeviceTables() {
    try {
      const DeviceGuard guard(device);
      for (DeviceMemory* memory : {&scalars, &chunks, &squares, &slices}) *memory = {};
      for (RowTable* table : {&rows, &before}) *table = {};
    } catch (const Error&) {  // the driver is gone already, and the memory with it
    }
  }
  DeviceTables(const DeviceTables&) = delete;
  DeviceTables& operator=(const DeviceTables&) = delete;

  const int32_t device;
  RowTable rows, before;  // before the step, where that reads gradients that are centralized
  DeviceMemory scalars, chunks;
  DeviceMemory squares;  // of each chunk's gradients
  DeviceMemory slices;   // of gradients that are centralized
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

RowTable make_rows(const std::vector<TensorRow>& rows, const Geometry& geometry) {
  RowTable table;
  std::vector<int64_t> layouts;
  std::vector<int64_t> layout_of;
  for (const TensorRow& row : rows) {
    layout_of.push_back(row.layout == nullptr ? -1 : static_cast<int64_t>(layouts.size()));
    if (row.layout != nullptr) append_layout(layouts, *row.layout);
  }
  table.layouts = on_device(layouts);
  std::vector<DeviceRow> records;
  for (size_t at = 0; at < rows.size(); ++at) {
    const TensorRow& row = rows[at];
    DeviceRow record = {};
    std::copy(row.data.begin(), row.data.end(), record.data);
    record.data[kGrad] = nullptr;
    record.numel = row.numel;
    record.step = row.step;
    if (layout_of[at] >= 0) {
      record.layout = static_cast<const int64_t*>(table.layouts.get()) + layout_of[at];
    }
    record.first = row.first;
    record.slice = row.slice;
    record.scratch = geometry.scratch[at];
    record.group = row.group;
    record.is_float64 = info_of(row.format).value == DType::kFloat64;
    record.grad_dtype = static_cast<int16_t>(row.grad_dtype);
    record.place = row.place;
    record.codec = static_cast<int32_t>(info_of(row.format).codecs[kParam]);
    records.push_back(record);
  }
  table.rows = on_device(records);
  return table;
}

// What the step reads where gradients are centralized: values side by side.
TensorRow centralized_row(TensorRow row) {
  row.grad_dtype = info_of(row.format).value;
  if (row.layout != nullptr) {
    auto layout = std::make_shared<Layout>(*row.layout);
    layout->strides[kGrad].clear();
    row.layout = std::move(layout);
  }
  return row;
}

// The kernels of a step, a pull and a swap, for each format and for elements side by side or not.
template <class Format>
constexpr bool kIsLow = sizeof(typename Format::Param::Stored) == 2;

struct StepKernels {
  template <class Format, bool kStrided, template <typename> class Elements>
  static auto of() {
    using T = typename Format::Value;
    using ExpAvg = typename Format::ExpAvg;
    if constexpr (std::is_same_v<typename Format::Param, Plain<T>> &&
                  std::is_same_v<ExpAvg, Plain<T>>) {
      return RadamKernel<Format, kStrided>();
    } else {
      using Parameters = std::conditional_t<kIsLow<Format>, LowParameters, Float32Parameters>;
      return WideRadamKernel<WideFormat<Parameters, ExpAvg, typename Format::ExpAvgSq>, Elements>();
    }
  }
};

struct PullKernels {
  template <class Format, bool kStrided, template <typename> class Elements>
  static auto of() {
    if constexpr (kIsLow<Format>) {
      return LowInterpolationKernel<Elements>();
    } else {
      return InterpolationKernel<typename Format::Value, kStrided>();
    }
  }
};

struct SwapKernels {
  template <class Format, bool kStrided, template <typename> class Elements>
  static auto of() {
    using Stored = typename Format::Param::Stored;
    return SwapKernel<std::conditional_t<kIsLow<Format>, uint16_t, Stored>, kStrided>();
  }
};

// Calls `run` with the kernel for a launch's kind of rows.
template <class Kernels, class Run>
void by_kind(const Launch& launch, const Run& run) {
  by_format(launch.format, [&](auto format) {
    using Format = decltype(format);
    launch.strided ? run(Kernels::template of<Format, true, Scattered>())
                   : run(Kernels::template of<Format, false, Consecutive>());
  });
}

// Its word for the schedule kernel.
uint64_t gradient_of_row(const TensorRow& row, int32_t) {
  const auto grad = reinterpret_cast<uint64_t>(row.data[kGrad]);
  return row.active ? std::max(grad, kNoGrad) : 0;
}

// Calls `run` with the schedule kernel of the smallest tier that so many words fit.
template <int kTier = 0, class Run>
void by_tier(int32_t words, const Run& run) {
  if constexpr (kTier + 1 < static_cast<int>(std::size(kScheduleTiers))) {
    if (words > kScheduleTiers[kTier]) return by_tier<kTier + 1>(words, run);
  }
  run(ScheduleKernel<kScheduleTiers[kTier]>());
}

}  // namespace

void Launcher::prepare(const Rows& rows) {
  if (version_ == rows.version) return;
  const DeviceGuard guard(device_);
  Geometry geometry = make_geometry(rows.rows, index_, kScheduleTiers[largest_tier()]);
  load_kernels(geometry);
  std::vector<TensorRow> ordered;
  for (int32_t i : geometry.order) ordered.push_back(rows.rows[i]);
  auto tables = std::make_shared<DeviceTables>(device_);
  if (!geometry.slices.empty()) tables->before = make_rows(ordered, geometry);
  for (TensorRow& row : ordered) {
    if (row.slice != 0) row = centralized_row(std::move(row));
  }
  tables->rows = make_rows(ordered, geometry);
  tables->scalars = on_device(std::vector<RowScalars>(ordered.size()));
  tables->chunks = on_device(geometry.chunks);
  tables->squares = on_device(std::vector<double>(geometry.chunks.size()));
  tables->slices = on_device(geometry.slices);
  geometry.chunks = {};  // the device has them now
  geometry_ = std::move(geometry);
  tables_ = std::move(tables);
  version_ = rows.version;
}

Tables Launcher::tables(const DeviceMemory& rows, const DeviceMemory& chunks,
                        int64_t first_chunk) const {
  return {static_cast<const DeviceRow*>(rows.get()),
          static_cast<RowScalars*>(tables_->scalars.get()),
          static_cast<const ChunkRef*>(chunks.get()) + first_chunk};
}

void Launcher::launch(const Rows& rows, const std::vector<Hyperparameters>& hypers,
                      const Signals& signals, void* scratch, void* stream) {
  const DeviceGuard guard(device_);
  keep_while_captured(stream, tables_);
  if (!geometry_.slices.empty()) {
    schedule(rows, {}, {}, kForGradients, gradient_of_row, stream);
    const CentralizeArgs args = {tables(tables_->before.rows, tables_->slices, 0), scratch};
    const auto blocks = static_cast<int64_t>(geometry_.slices.size());
    cuda::launch<CentralizeKernel>(blocks, stream, args);
  }
  const auto grad_of = [&](const TensorRow& row, int32_t at) {
    if (row.slice == 0 || !row.active) return gradient_of_row(row, at);
    return reinterpret_cast<uint64_t>(scratch) + geometry_.scratch[at];
  };
  const int64_t purpose = rule_ == Rule::kLookahead ? kForPull : kForStep;
  schedule(rows, hypers, signals, purpose, grad_of, stream);
  rule_ == Rule::kRadam ? run<StepKernels>(stream) : run<PullKernels>(stream);
}

template <class GradOf>
void Launcher::schedule(const Rows& rows, const std::vector<Hyperparameters>& hypers,
                        const Signals& signals, int64_t purpose, const GradOf& grad_of,
                        void* stream) {
  const Tables its = tables(tables_->rows.rows, tables_->chunks, 0);
  for (const ScheduleLaunch& launch : geometry_.schedules) {
    by_tier(launch.words(), [&](auto kernel) {
      typename decltype(kernel)::Args args = {};
      args.header = {its,
                     launch.first_row,
                     launch.row_count,
                     launch.first_group,
                     launch.group_count,
                     signals.grad_scale,
                     signals.found_inf,
                     signals.norm,
                     purpose};
      uint64_t* word = args.words;
      for (int32_t i = 0; i < launch.group_count; ++i, word += kGroupWords) {
        if (purpose == kForGradients) continue;
        const int32_t group = launch.first_group + i;
        const GroupArgs group_args = {hypers[group], signals.lr[group]};
        std::memcpy(word, &group_args, sizeof(group_args));
      }
      for (int32_t i = 0; i < launch.row_count; ++i) {
        const int32_t at = launch.first_row + i;
        *word++ = grad_of(rows.rows[geometry_.order[at]], at);
      }
      const int64_t blocks = (launch.row_count + kThreads - 1) / kThreads;
      cuda::launch<decltype(kernel)>(blocks, stream, args);
    });
  }
}

template <class Kernels>
void Launcher::run(void* stream) {
  for (const Launch& launch : geometry_.launches) {
    const StepArgs args = {tables(tables_->rows.rows, tables_->chunks, launch.first_chunk)};
    by_kind<Kernels>(launch, [&](auto kernel) {
      cuda::launch<decltype(kernel)>(launch.chunk_count, stream, args);
    });
  }
}

void Launcher::squares(const Rows& rows, const std::vector<int32_t>& places, double* total,
                       void* stream) {
  const DeviceGuard guard(device_);
  keep_while_captured(stream, tables_);
  const auto grad_of = [&](const TensorRow& row, int32_t at) {
    return is_among(row, places) ? gradient_of_row(row, at) : 0;
  };
  schedule(rows, {}, {}, kForGradients, grad_of, stream);
  const RowTable& its = geometry_.slices.empty() ? tables_->rows : tables_->before;
  double* const of_chunks = static_cast<double*>(tables_->squares.get());
  int64_t count = 0;
  for (const Launch& launch : geometry_.launches) {
    const SquaresArgs args = {tables(its.rows, tables_->chunks, launch.first_chunk),
                              of_chunks + launch.first_chunk};
    launch.strided ? cuda::launch<SquaresKernel<true>>(launch.chunk_count, stream, args)
                   : cuda::launch<SquaresKernel<false>>(launch.chunk_count, stream, args);
    count += launch.chunk_count;
  }
  cuda::launch<TotalKernel>(1, stream, {of_chunks, count, total});
}

// A step must not fail in its middle, and a capture must find what it records.
void Launcher::load_kernels(const Geometry& geometry) const {
  const auto load = [](auto kernel) { require<decltype(kernel)>(); };
  for (const ScheduleLaunch& launch : geometry.schedules) by_tier(launch.words(), load);
  if (rule_ == Rule::kRadam) load(TotalKernel());
  if (!geometry.slices.empty()) load(CentralizeKernel());
  for (const Launch& launch : geometry.launches) {
    rule_ == Rule::kRadam ? by_kind<StepKernels>(launch, load) : by_kind<PullKernels>(launch, load);
    if (launch.has_slow) by_kind<SwapKernels>(launch, load);
    if (rule_ == Rule::kRadam)
      launch.strided ? load(SquaresKernel<true>()) : load(SquaresKernel<false>());
  }
}

void Launcher::swap(void* stream) {
  const DeviceGuard guard(device_);
  keep_while_captured(stream, tables_);
  run<SwapKernels>(stream);
}

}  // namespace ranger::cuda
