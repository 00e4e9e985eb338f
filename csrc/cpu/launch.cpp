#include "launch.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../rule/radam_lookahead.h"
#include "values.h"

namespace ranger::cpu {
namespace {

// Whether the kernels can work on all of the row's streams as they are.
bool is_direct(const TensorRow& row) {
  const FormatInfo& format = info_of(row.format);
  bool direct = row.layout == nullptr && row.slice == 0;
  for (int stream = 0; stream < kStreams; ++stream) {
    if (row.data[stream] == nullptr) continue;
    direct = direct && !(stream != kGrad && codec_of(row, stream).has_rest()) &&
             stored(row, stream) == format.value;
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

// The sum of so many lanes, a power of two, which it takes as room.
template <typename T>
T folded(T* sums, int lanes) {
  for (int left = lanes / 2; left > 0; left /= 2) {
    for (int lane = 0; lane < left; ++lane) sums[lane] += sums[left + lane];
  }
  return sums[0];
}

// Of a slice that has no more elements than there are lanes; those beyond are 0, and left out.
template <typename T>
T sum_of_short_slice(const T* g, int count) {
  int lanes = 1;
  while (lanes < count) lanes *= 2;
  T sums[kLanes];
  for (int lane = 0; lane < count; ++lane) sums[lane] = T(0) + g[lane];  // -0 becomes 0
  for (int lane = count; lane < lanes; ++lane) sums[lane] = T(0);
  return folded(sums, lanes);
}

// The means of a chunk's slices.
template <typename T>
class Means {
 public:
  Means(const TensorRow& row, const Chunk& chunk) : row_(row) {
    if (row.slice == 0) return;
    first_ = chunk.begin / row.slice;
    const int64_t slices = chunk.count / row.slice;
    means_.reserve(slices);
    if (row.slice > kLanes) {
      for (int64_t i = 0; i < slices; ++i) add_long(chunk.begin + i * row.slice);
      return;
    }
    const int64_t most = kPieceSize / row.slice * row.slice;  // of elements, read at a time
    for (int64_t done = 0; done < chunk.count; done += most) {
      const Chunk piece = {0, chunk.begin + done, std::min(most, chunk.count - done)};
      const Values<T> g(row, piece, kGrad);
      for (int64_t i = 0; i < piece.count; i += row.slice) {
        means_.push_back(
            mean(sum_of_short_slice(g.data() + i, static_cast<int>(row.slice)), row.slice));
      }
    }
  }

  // The gradients of a piece of it, as the rule takes them; those themselves are not written.
  const T* centralized_gradients(const Chunk& piece, const T* g) const {
    if (row_.slice == 0) return g;
    T* const out = static_cast<T*>(scratch(kTensors + kGrad));
    for (int64_t i = 0; i < piece.count;) {
      const int64_t slice = (piece.begin + i) / row_.slice;
      const int64_t end = std::min(piece.count, (slice + 1) * row_.slice - piece.begin);
      const T its = means_[slice - first_];
      for (; i < end; ++i) out[i] = centralized(g[i], its);
    }
    return out;
  }

 private:
  void add_long(int64_t begin) {
    T sums[kLanes] = {};
    for (int64_t done = 0; done < row_.slice; done += kPieceSize) {
      const Chunk piece = {0, begin + done, std::min(kPieceSize, row_.slice - done)};
      kernels_of<T>().add_to_lanes(Values<T>(row_, piece, kGrad).data(), piece.count, sums);
    }
    means_.push_back(mean(folded(sums, kLanes), row_.slice));
  }

  const TensorRow& row_;
  int64_t first_ = 0;
  std::vector<T> means_;
};

template <typename T>
void run_radam(const TensorRow& row, const Chunk& chunk, const StepScalars& now,
               const Means<T>& means) {
  const Values<T> p(row, chunk, kParam), g(row, chunk, kGrad);
  const Values<T> m(row, chunk, kExpAvg), v(row, chunk, kExpAvgSq);
  RadamArgs<T> args{of<T>(now),
                    now.schedule.rectified,
                    false,
                    codec_of(row, kExpAvgSq).is_root,
                    chunk.count,
                    p.data(),
                    means.centralized_gradients(chunk, g.data()),
                    m.data(),
                    v.data()};
  const RandomKeys keys = random_keys(now.seed, row.place, now.step, false);
  RandomWords words(row, chunk);
  if (now.schedule.sync && row.data[kSlowParam] != nullptr) {
    const Values<T> slow(row, chunk, kSlowParam), b(row, chunk, kOuterMomentumBuffer);
    if (b.data() == nullptr) {  // in the same pass
      args.sync = true;
      args.slow = slow.data();
      kernels_of<T>().radam(args);
    } else {
      args.c.low = -std::numeric_limits<T>::infinity();  // bounds come after the pull
      args.c.high = std::numeric_limits<T>::infinity();
      kernels_of<T>().radam(args);
      kernels_of<T>().lookahead({of<T>(now), chunk.count, p.data(), slow.data(), b.data()});
    }
    slow.write_back(words, keys.of_param());
    b.write_back(words, {});
  } else {
    kernels_of<T>().radam(args);
  }
  p.write_back(words, keys.of_param());
  m.write_back(words, keys.of_exp_avg());
  v.write_back(words, keys.of_exp_avg_sq());
}

template <typename T>
void run_lookahead(const TensorRow& row, const Chunk& chunk, const StepScalars& now) {
  const Values<T> p(row, chunk, kParam), slow(row, chunk, kSlowParam);
  const Values<T> b(row, chunk, kOuterMomentumBuffer);
  kernels_of<T>().lookahead({of<T>(now), chunk.count, p.data(), slow.data(), b.data()});
  const RandomKeys keys = random_keys(now.seed, row.place, now.step, true);
  RandomWords words(row, chunk);
  p.write_back(words, keys.of_param());
  slow.write_back(words, keys.of_param());
  b.write_back(words, {});
}

// Bits change places, not values.
void run_swap(const TensorRow& row, const Chunk& chunk) {
  const Elements p(row, chunk, kParam), slow(row, chunk, kSlowParam);
  auto* const bytes = static_cast<char*>(p.data());
  std::swap_ranges(bytes, bytes + chunk.count * info_of(stored(row, kParam)).item_size,
                   static_cast<char*>(slow.data()));
  p.write_back();
  slow.write_back();
}

// Calls `run` for a chunk, or for as much of it at a time as can be copied.
template <class Run>
void for_each_piece(const Chunk& chunk, bool direct, const Run& run) {
  const int64_t most = direct ? chunk.count : kPieceSize;
  for (int64_t done = 0; done < chunk.count; done += most) {
    const int64_t count = std::min(most, chunk.count - done);
    run(Chunk{chunk.row, chunk.begin + done, count});
  }
}

template <typename T>
void run_chunk(Rule rule, const TensorRow& row, const Chunk& chunk, const StepScalars& now) {
  const Means<T> means(row, chunk);
  for_each_piece(chunk, is_direct(row), [&](const Chunk& piece) {
    rule == Rule::kRadam ? run_radam<T>(row, piece, now, means) : run_lookahead<T>(row, piece, now);
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
    int64_t unit = kGroup;
    if (row.slice != 0) {
      unit = info_of(row.format).counts_elements() ? std::lcm(row.slice, unit) : row.slice;
    }
    const int64_t size = std::max(kChunkSize / unit * unit, unit);
    for (int64_t begin = 0; begin < row.numel; begin += size) {
      chunks_.push_back({static_cast<int32_t>(i), begin, std::min(size, row.numel - begin)});
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

double Launcher::squares(const Rows& rows, const std::vector<int32_t>& places,
                         int num_threads) const {
  const auto is_counted = [&](const TensorRow& row) { return row.active && is_among(row, places); };
  int64_t elements = 0;
  for (const TensorRow& row : rows.rows) {
    if (row.launcher == index_ && is_counted(row)) elements += row.numel;
  }
  std::vector<double> of_chunk(chunks_.size());
  for_each_chunk(chunks_, elements, num_threads, [&](const Chunk& chunk) {
    const TensorRow& row = rows.rows[chunk.row];
    if (!is_counted(row)) return;
    double& sum = of_chunk[&chunk - chunks_.data()];
    for_each_piece(chunk, is_direct(row), [&](const Chunk& piece) {
      sum +=
          info_of(row.format).value == DType::kFloat64
              ? kernels_of<double>().squares(Values<double>(row, piece, kGrad).data(), piece.count)
              : kernels_of<float>().squares(Values<float>(row, piece, kGrad).data(), piece.count);
    });
  });
  return std::accumulate(of_chunk.begin(), of_chunk.end(), 0.0);
}

void Launcher::swap(const Rows& rows, int num_threads) const {
  int64_t elements = 0;
  for (const TensorRow& row : rows.rows) {
    if (row.active && row.launcher == index_) elements += row.numel;
  }
  for_each_chunk(chunks_, elements, num_threads, [&](const Chunk& chunk) {
    const TensorRow& row = rows.rows[chunk.row];
    if (!row.active) return;
    for_each_piece(chunk, row.layout == nullptr, [&](const Chunk& piece) { run_swap(row, piece); });
  });
}

}  // namespace ranger::cpu
