// A row's streams as the CPU's kernels take them: values side by side, in the tensors' own memory
// or copied to a thread's room.
#pragma once

#include <cstring>
#include <memory>
#include <type_traits>

#include "kernels.h"
#include "launch.h"
#include "strided.h"

namespace ranger::cpu {

// Elements that a thread copies at a time, whole groups: the copies of all streams stay in its
// caches.
constexpr int64_t kPieceSize = 2048;
static_assert(kPieceSize % kGroup == 0 && kPieceSize % kLanes == 0 && kChunkSize % kPieceSize == 0);

// A thread's room for the copies of a tensor, for the values of a stream, and for random words,
// kept from step to step.
constexpr int kRooms = kTensors + kStreams + 1;
inline void* scratch(int room) {
  thread_local std::unique_ptr<double[]> rooms;
  if (!rooms) rooms.reset(new double[kRooms * kPieceSize]);
  return rooms.get() + room * kPieceSize;
}

// The random words of some elements of a row: those of the last key, which two streams share.
class RandomWords {
 public:
  RandomWords(const TensorRow& row, const Chunk& chunk)
      : position_(static_cast<uint32_t>(row.first + chunk.begin)),
        count_(chunk.count),
        words_(static_cast<uint32_t*>(scratch(kTensors + kStreams))) {}

  const uint32_t* of(const RandomBits& random) {
    if (random.key != key_ || random.factor != factor_) {
      kernels().random_words(random, position_, words_, count_);
    }
    key_ = random.key;
    factor_ = random.factor;
    return words_;
  }

 private:
  uint32_t position_;
  int64_t count_;
  uint32_t* words_;
  uint32_t key_ = 0, factor_ = 0;  // no factor is 0
};

inline bool is_strided(const TensorRow& row, int tensor) {
  return row.layout != nullptr && !row.layout->strides[tensor].empty();
}

// Elements of a tensor side by side: its own memory, or a copy.
class Elements {
 public:
  Elements(const TensorRow& row, const Chunk& chunk, int tensor)
      : row_(row), chunk_(chunk), tensor_(tensor), data_(row.data[tensor]) {
    if (data_ == nullptr) return;
    item_ = info_of(stored(row, tensor)).item_size;
    if (is_strided(row, tensor)) {
      data_ = scratch(tensor);
      for_each([](char* element, char* copy, auto size) { std::memcpy(copy, element, size); });
    } else {
      const int64_t first = is_grouped(row, tensor) ? chunk.begin / kGroup : chunk.begin;
      data_ = static_cast<char*>(data_) + first * item_;
    }
  }

  void* data() const { return data_; }

  // Puts a copy back; nothing to do for the tensor's own memory.
  void write_back() const {
    if (data_ == nullptr || !is_strided(row_, tensor_)) return;
    for_each([](char* element, char* copy, auto size) { std::memcpy(element, copy, size); });
  }

 private:
  // Calls visit(element, copy, size) for each element and its place in the copy.
  template <class Visit>
  void for_each(const Visit& visit) const {
    const auto with_size = [&](auto size) {
      for_each_offset(row_.layout->sizes, row_.layout->strides[tensor_], chunk_.begin, chunk_.count,
                      [&](int64_t i, int64_t offset) {
                        visit(static_cast<char*>(row_.data[tensor_]) + offset * size,
                              static_cast<char*>(data_) + i * size, size);
                      });
    };
    switch (item_) {
      case 1:
        return with_size(std::integral_constant<int64_t, 1>());
      case 2:
        return with_size(std::integral_constant<int64_t, 2>());
      case 4:
        return with_size(std::integral_constant<int64_t, 4>());
      default:
        return with_size(std::integral_constant<int64_t, 8>());
    }
  }

  const TensorRow& row_;
  const Chunk& chunk_;
  int tensor_;
  void* data_;
  int64_t item_ = 0;
};

// One stream of some elements as values side by side: what is stored, or decoded from it.
template <typename T>
class Values {
 public:
  Values(const TensorRow& row, const Chunk& chunk, Stream stream)
      : row_(row),
        chunk_(chunk),
        stream_(stream),
        elements_(row, chunk, stream),
        rest_(row, chunk, kRestOf + stream) {
    if (elements_.data() == nullptr || is_plain()) {
      values_ = static_cast<T*>(elements_.data());
      return;
    }
    values_ = static_cast<T*>(scratch(kTensors + stream));
    if (stream == kGrad) {
      kernels_of<T>().widen[static_cast<int>(row.grad_dtype)](elements_.data(), values_,
                                                              chunk.count);
    } else {
      kernels_of<T>().decode[codec()]({elements_.data(), rest_.data(), chunk.count}, values_);
    }
  }

  T* data() const { return values_; }

  // Stores the values; where they are the tensor's own memory, there is nothing to do.
  void write_back(RandomWords& words, const RandomBits& random) const {
    if (values_ == nullptr) return;
    if (!is_plain()) {
      const uint32_t* const its = codec_of(row_, stream_).is_random ? words.of(random) : nullptr;
      kernels_of<T>().encode[codec()](values_, {elements_.data(), rest_.data(), chunk_.count}, its,
                                      random.shift);
    }
    elements_.write_back();
    rest_.write_back();
  }

 private:
  bool is_plain() const {
    if (stream_ == kGrad) return row_.grad_dtype == kDTypeOf<T>;
    return info_of(row_.format).codecs[stream_] == kCodecOf<Plain<T>>;
  }
  int codec() const { return static_cast<int>(info_of(row_.format).codecs[stream_]); }

  const TensorRow& row_;
  const Chunk& chunk_;
  Stream stream_;
  Elements elements_;
  Elements rest_;
  T* values_;
};

}  // namespace ranger::cpu
