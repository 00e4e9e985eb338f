#include "launch.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "kernels.h"
#include "strided.h"

namespace ranger::cpu {
namespace {

// Elements that a thread copies at a time: the copies of all streams stay in its caches.
constexpr int64_t kPieceSize = 2048;

// A thread's room for one stream's copies, kept from step to step.
template <typename T>
T* scratch(Stream stream) {
  thread_local std::unique_ptr<T[]> room;
  if (!room) room.reset(new T[kStreams * kPieceSize]);
  return room.get() + stream * kPieceSize;
}

// One stream of some elements as values side by side: the tensor's own memory, or a copy.
template <typename T>
class Values {
 public:
  Values(const TensorRow& row, const Chunk& chunk, Stream stream)
      : row_(row), chunk_(chunk), stream_(stream) {
    if (row.data[stream] == nullptr || is_own()) {
      values_ = row.data[stream] == nullptr ? nullptr : reinterpret_cast<T*>(consecutive());
      return;
    }
    values_ = scratch<T>(stream);
    if (is_strided()) {
      for_each_element([](auto& element, T& value) {
        value = Plain<std::decay_t<decltype(element)>>::template decode<T>(element);
      });
    } else {
      kernels_of<T>().decode[static_cast<int>(dtype())](consecutive(), values_, chunk.count);
    }
  }

  T* data() const { return values_; }

  // Puts a copy's values back; nothing to do for a tensor's own memory.
  void write_back() const {
    if (values_ == nullptr || is_own()) return;
    if (is_strided()) {
      for_each_element([](auto& element, T& value) {
        using Stored = std::decay_t<decltype(element)>;
        // Nothing is stored in 16 bits yet: see kernels.cpp.
        if constexpr (std::is_arithmetic_v<Stored>) element = Plain<Stored>::encode(value);
      });
    } else {
      kernels_of<T>().encode[static_cast<int>(dtype())](values_, consecutive(), chunk_.count);
    }
  }

 private:
  DType dtype() const { return stored(row_, stream_); }
  bool is_strided() const {
    return row_.layout != nullptr && !row_.layout->strides[stream_].empty();
  }
  bool is_own() const { return !is_strided() && dtype() == kDTypeOf<T>; }

  char* consecutive() const {
    return static_cast<char*>(row_.data[stream_]) + chunk_.begin * info_of(dtype()).item_size;
  }

  // Calls visit(element, value) for each element and its place in the copy.
  template <class Visit>
  void for_each_element(const Visit& visit) const {
    by_dtype(dtype(), [&](auto zero) {
      auto* const base = static_cast<decltype(zero)*>(row_.data[stream_]);
      for_each_offset(row_.layout->sizes, row_.layout->strides[stream_], chunk_.begin, chunk_.count,
                      [&](int64_t i, int64_t offset) { visit(base[offset], values_[i]); });
    });
  }

  const TensorRow& row_;
  const Chunk& chunk_;
  Stream stream_;
  T* values_;
};

// Whether the kernels can work on all of the row's streams as they are.
bool is_direct(const TensorRow& row, DType value) {
  bool direct = row.layout == nullptr;
  for (int stream = 0; stream < kStreams; ++stream) {
    if (row.data[stream] == nullptr) continue;
    direct = direct && stored(row, static_cast<Stream>(stream)) == value;
  }
  return direct;
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
void run_radam(const TensorRow& row, const Chunk& chunk, const StepScalars& now) {
  const Values<T> p(row, chunk, kParam), g(row, chunk, kGrad);
  const Values<T> m(row, chunk, kExpAvg), v(row, chunk, kExpAvgSq);
  RadamArgs<T> args{
      of<T>(now), now.schedule.rectified, false, chunk.count, p.data(), g.data(), m.data(),
      v.data()};
  if (now.schedule.sync && row.data[kSlowParam] != nullptr) {
    const Values<T> slow(row, chunk, kSlowParam);
    args.sync = true;
    args.slow = slow.data();
    kernels_of<T>().radam(args);
    slow.write_back();
  } else {
    kernels_of<T>().radam(args);
  }
  for (const Values<T>* written : {&p, &m, &v}) written->write_back();
}

template <typename T>
void run_lookahead(const TensorRow& row, const Chunk& chunk, const StepScalars& now) {
  const Values<T> p(row, chunk, kParam), slow(row, chunk, kSlowParam);
  kernels_of<T>().lookahead({chunk.count, p.data(), slow.data(), of<T>(now).alpha});
  p.write_back();
  slow.write_back();
}

// Bits change places, not values.
template <typename T>
void run_swap(const TensorRow& row, const Chunk& chunk) {
  const Values<T> p(row, chunk, kParam), slow(row, chunk, kSlowParam);
  std::swap_ranges(p.data(), p.data() + chunk.count, slow.data());
  p.write_back();
  slow.write_back();
}

// Calls `run` for a chunk, or for as much of it at a time as can be copied.
template <class Run>
void for_each_piece(const Chunk& chunk, bool direct, const Run& run) {
  const int64_t most = direct ? chunk.count : kPieceSize;
  for (int64_t done = 0; done < chunk.count; done += most) {
    const int64_t count = std::min(most, chunk.count - done);
    run(Chunk{chunk.row, static_cast<int32_t>(count), chunk.begin + done});
  }
}

template <typename T>
void run_chunk(Rule rule, const TensorRow& row, const Chunk& chunk, const StepScalars& now) {
  for_each_piece(chunk, is_direct(row, kDTypeOf<T>), [&](const Chunk& piece) {
    rule == Rule::kRadam ? run_radam<T>(row, piece, now) : run_lookahead<T>(row, piece, now);
  });
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
  for_each_chunk(chunks_, elements, num_threads, [&](const Chunk& chunk) {
    const StepScalars* const now = of_row_[chunk.row];
    if (now == nullptr || !(rule_ == Rule::kRadam || now->schedule.sync)) return;
    const TensorRow& row = rows.rows[chunk.row];
    info_of(row.format).value == DType::kFloat64 ? run_chunk<double>(rule_, row, chunk, *now)
                                                 : run_chunk<float>(rule_, row, chunk, *now);
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
    const DType dtype = stored(row, kParam);
    for_each_piece(chunk, is_direct(row, dtype), [&](const Chunk& piece) {
      dtype == DType::kFloat64 ? run_swap<double>(row, piece) : run_swap<float>(row, piece);
    });
  });
}

}  // namespace ranger::cpu
