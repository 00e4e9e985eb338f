#include "launch.h"

#include <algorithm>
#include <array>
#include <memory>
#include <type_traits>

#include "kernels.h"
#include "strided.h"

namespace ranger::cpu {
namespace {

// One stream of one chunk as consecutive memory: the tensor's own, or a copy of it in `scratch`.
template <typename T>
class ChunkView {
 public:
  ChunkView(const TensorRow& row, const Chunk& chunk, Stream stream, T* scratch)
      : row_(row), chunk_(chunk), stream_(stream) {
    T* base = static_cast<T*>(row.data[stream]);
    if (base == nullptr) {
      data_ = nullptr;
    } else if (is_consecutive()) {
      data_ = base + chunk.begin;
    } else {
      data_ = scratch;
      for_each_offset(row.layout->sizes, row.layout->strides[stream], chunk.begin, chunk.count,
                      [&](int64_t i, int64_t offset) { scratch[i] = base[offset]; });
    }
  }

  T* data() const { return data_; }

  // Puts a copy's elements back; nothing to do for a tensor's own memory.
  void write_back() const {
    if (data_ == nullptr || is_consecutive()) return;
    T* base = static_cast<T*>(row_.data[stream_]);
    for_each_offset(row_.layout->sizes, row_.layout->strides[stream_], chunk_.begin, chunk_.count,
                    [&](int64_t i, int64_t offset) { base[offset] = data_[i]; });
  }

 private:
  bool is_consecutive() const {
    return row_.layout == nullptr || row_.layout->strides[stream_].empty();
  }

  const TensorRow& row_;
  const Chunk& chunk_;
  Stream stream_;
  T* data_;
};

// A thread's room for the chunk copies, kept from step to step.
template <typename T>
T* scratch(Stream stream) {
  thread_local std::unique_ptr<T[]> room;
  if (!room) room.reset(new T[kStreams * kChunkSize]);
  return room.get() + stream * kChunkSize;
}

template <typename T>
const Coefficients<T>& of(const StepScalars& scalars) {
  if constexpr (std::is_same_v<T, float>) {
    return scalars.f32;
  } else {
    return scalars.f64;
  }
}

template <typename T>
void radam_chunk(const TensorRow& row, const Chunk& chunk, const StepScalars& now) {
  const bool sync = now.schedule.sync && row.data[kSlowParam] != nullptr;
  RadamArgs<T> args{of<T>(now), now.schedule.rectified, sync, chunk.count};
  const auto bind = [&](auto&& at) {
    args.p = at(kParam);
    args.g = at(kGrad);
    args.m = at(kExpAvg);
    args.v = at(kExpAvgSq);
    args.slow = sync ? at(kSlowParam) : nullptr;
    radam(kernels(), args);
  };
  if (row.layout == nullptr) {
    bind([&](Stream stream) { return static_cast<T*>(row.data[stream]) + chunk.begin; });
    return;
  }
  const auto view = [&](Stream s) { return ChunkView<T>(row, chunk, s, scratch<T>(s)); };
  const std::array<ChunkView<T>, kStreams> views = {view(kParam), view(kGrad), view(kExpAvg),
                                                    view(kExpAvgSq), view(kSlowParam)};
  bind([&](Stream stream) { return views[stream].data(); });
  for (Stream written : {kParam, kExpAvg, kExpAvgSq}) views[written].write_back();
  if (sync) views[kSlowParam].write_back();
}

template <typename T>
void lookahead_chunk(const TensorRow& row, const Chunk& chunk, const StepScalars& now) {
  const ChunkView<T> p(row, chunk, kParam, scratch<T>(kParam));
  const ChunkView<T> slow(row, chunk, kSlowParam, scratch<T>(kSlowParam));
  lookahead(kernels(), LookaheadArgs<T>{chunk.count, p.data(), slow.data(), of<T>(now).alpha});
  p.write_back();
  slow.write_back();
}

template <typename T>
void swap_chunk(const TensorRow& row, const Chunk& chunk) {
  const ChunkView<T> p(row, chunk, kParam, scratch<T>(kParam));
  const ChunkView<T> slow(row, chunk, kSlowParam, scratch<T>(kSlowParam));
  std::swap_ranges(p.data(), p.data() + chunk.count, slow.data());
  p.write_back();
  slow.write_back();
}

template <typename Body>
void for_each_chunk(const std::vector<Chunk>& chunks, int64_t elements, int num_threads,
                    Body body) {
  const int64_t count = static_cast<int64_t>(chunks.size());
  num_threads = static_cast<int>(std::min<int64_t>(num_threads, count));
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && elements > kSerialElements)
  for (int64_t i = 0; i < count; ++i) body(chunks[i]);
}

}  // namespace

void Launcher::prepare(const Rows& rows) {
  if (version_ == rows.version) return;
  version_ = -1;
  chunks_.clear();
  for (size_t i = 0; i < rows.rows.size(); ++i) {
    const TensorRow& row = rows.rows[i];
    if (row.launcher != index_) continue;
    for (int64_t begin = 0; begin < row.numel; begin += kChunkSize) {
      const int64_t count = std::min<int64_t>(kChunkSize, row.numel - begin);
      chunks_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(count), begin});
    }
  }
  version_ = rows.version;
}

void Launcher::launch(const Rows& rows, const std::vector<Hyperparameters>& hypers,
                      const Signals& signals, int num_threads) {
  of_row_.assign(rows.rows.size(), nullptr);
  scalars_.clear();
  // Parameters of a group mostly share their step, and so their scalars.
  int32_t last_group = -1;
  int64_t last_step = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < rows.rows.size(); ++i) {
    const TensorRow& row = rows.rows[i];
    if (!row.active || row.launcher != index_) continue;
    const int64_t step = static_cast<int64_t>(*row.step) + 1;
    if (row.group != last_group || step != last_step) {
      const Hyperparameters& hyper = hypers[row.group];
      scalars_.emplace_back(hyper, step, grad_scale(hyper, signals.unscale, signals.norm));
      last_group = row.group;
      last_step = step;
    }
    of_row_[i] = &scalars_.back();
    elements += row.numel;
    *row.step = static_cast<float>(step);
  }
  const bool fused = rule_ == Rule::kRadam;
  for_each_chunk(chunks_, elements, num_threads, [&](const Chunk& chunk) {
    const StepScalars* const now = of_row_[chunk.row];
    if (now == nullptr || !(fused || now->schedule.sync)) return;
    const TensorRow& row = rows.rows[chunk.row];
    if (row.dtype == DType::kFloat64) {
      fused ? radam_chunk<double>(row, chunk, *now) : lookahead_chunk<double>(row, chunk, *now);
    } else {
      fused ? radam_chunk<float>(row, chunk, *now) : lookahead_chunk<float>(row, chunk, *now);
    }
  });
}

void Launcher::swap(const Rows& rows, int num_threads) const {
  int64_t elements = 0;
  for (const TensorRow& row : rows.rows) {
    if (row.active && row.launcher == index_) elements += row.numel;
  }
  for_each_chunk(chunks_, elements, num_threads, [&](const Chunk& chunk) {
    const TensorRow& row = rows.rows[chunk.row];
    if (!row.active) return;
    row.dtype == DType::kFloat64 ? swap_chunk<double>(row, chunk) : swap_chunk<float>(row, chunk);
  });
}

}  // namespace ranger::cpu
