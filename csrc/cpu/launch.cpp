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
    } else if (row.strides[stream].empty()) {
      data_ = base + chunk.begin;
    } else {
      data_ = scratch;
      for_each_offset(row.sizes, row.strides[stream], chunk.begin, chunk.count,
                      [&](int64_t i, int64_t offset) { scratch[i] = base[offset]; });
    }
  }

  T* data() const { return data_; }

  // Puts a copy's elements back; nothing to do for a tensor's own memory.
  void write_back() const {
    const Strides& strides = row_.strides[stream_];
    if (data_ == nullptr || strides.empty()) return;
    T* base = static_cast<T*>(row_.data[stream_]);
    for_each_offset(row_.sizes, strides, chunk_.begin, chunk_.count,
                    [&](int64_t i, int64_t offset) { base[offset] = data_[i]; });
  }

 private:
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

bool is_consecutive(const TensorRow& row) {
  for (const Strides& strides : row.strides) {
    if (!strides.empty()) return false;
  }
  return true;
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
  if (is_consecutive(row)) {
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
void for_each_chunk(const std::vector<TensorRow>& rows, const std::vector<Chunk>& chunks,
                    int64_t elements, int num_threads, Body body) {
  const int64_t count = static_cast<int64_t>(chunks.size());
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && elements > kSerialElements)
  for (int64_t i = 0; i < count; ++i) body(rows[chunks[i].row], chunks[i]);
}

// Those of rows that move, with their scalars.
template <typename Body>
void for_each_active_chunk(const std::vector<TensorRow>& rows, const std::vector<Chunk>& chunks,
                           const RowScalars& scalars, int num_threads, Body body) {
  int64_t elements = 0;
  for (size_t row = 0; row < rows.size(); ++row) {
    if (scalars[row] != nullptr) elements += rows[row].numel;
  }
  for_each_chunk(rows, chunks, elements, num_threads,
                 [&](const TensorRow& row, const Chunk& chunk) {
                   const StepScalars* const now = scalars[chunk.row];
                   if (now != nullptr) body(row, chunk, *now);
                 });
}

}  // namespace

void radam_step(const std::vector<TensorRow>& rows, const std::vector<Chunk>& chunks,
                const RowScalars& scalars, int num_threads) {
  for_each_active_chunk(rows, chunks, scalars, num_threads,
                        [](const TensorRow& row, const Chunk& chunk, const StepScalars& now) {
                          row.dtype == DType::kFloat64 ? radam_chunk<double>(row, chunk, now)
                                                       : radam_chunk<float>(row, chunk, now);
                        });
}

void lookahead_step(const std::vector<TensorRow>& rows, const std::vector<Chunk>& chunks,
                    const RowScalars& scalars, int num_threads) {
  for_each_active_chunk(rows, chunks, scalars, num_threads,
                        [](const TensorRow& row, const Chunk& chunk, const StepScalars& now) {
                          if (!now.schedule.sync) return;
                          row.dtype == DType::kFloat64 ? lookahead_chunk<double>(row, chunk, now)
                                                       : lookahead_chunk<float>(row, chunk, now);
                        });
}

void swap_slow_weights(const std::vector<TensorRow>& rows, const std::vector<Chunk>& chunks,
                       int num_threads) {
  int64_t elements = 0;
  for (const TensorRow& row : rows) elements += row.device == kCpu ? row.numel : 0;
  for_each_chunk(rows, chunks, elements, num_threads, [](const TensorRow& row, const Chunk& chunk) {
    if (row.data[kSlowParam] == nullptr) return;
    row.dtype == DType::kFloat64 ? swap_chunk<double>(row, chunk) : swap_chunk<float>(row, chunk);
  });
}

}  // namespace ranger::cpu
