// Streams that are more than a number an element, as a thread reads and writes them. It has kPack
// neighbouring elements at a time, four threads a group.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace ranger::cuda {

constexpr int kPack = 8;

// --- elements as they lie ------------------------------------------------------------------------

// kPack elements in words: compilers take bytes that are bytes apart one by one.
template <typename T>
struct alignas(sizeof(T) * kPack < 16 ? sizeof(T) * kPack : 16) Raw {
  uint32_t words[sizeof(T) * kPack / 4] = {};
  static constexpr int kInWord = sizeof(T) < 4 ? 4 / sizeof(T) : 1;

  RANGER_HOST_DEVICE T get(int j) const {
    if constexpr (sizeof(T) < 4) {
      using Bits = std::conditional_t<sizeof(T) == 1, uint8_t, uint16_t>;
      return with_bits_of<T>(static_cast<Bits>(words[j / kInWord] >> shift_of(j)));
    } else {
      T value;
      std::memcpy(&value, words + j * sizeof(T) / 4, sizeof(T));
      return value;
    }
  }
  // Once an element.
  RANGER_HOST_DEVICE void put(int j, T value) {
    if constexpr (sizeof(T) < 4) {
      using Bits = std::conditional_t<sizeof(T) == 1, uint8_t, uint16_t>;
      words[j / kInWord] |= static_cast<uint32_t>(with_bits_of<Bits>(value)) << shift_of(j);
    } else {
      std::memcpy(words + j * sizeof(T) / 4, &value, sizeof(T));
    }
  }

 private:
  static RANGER_HOST_DEVICE int shift_of(int j) { return j % kInWord * 8 * sizeof(T); }
};

// Of the kPack elements of a tensor from element `i` of a block on, `n` are loaded and stored, none
// if it is not positive: side by side, or wherever the row's layout says.
template <typename T>
class Consecutive {
 public:
  RANGER_HOST_DEVICE Consecutive(const DeviceRow&, const void* base, int, int64_t begin)
      : first_(static_cast<T*>(const_cast<void*>(base)) + begin),
        aligned_(reinterpret_cast<uintptr_t>(first_) % 16 == 0) {}

  RANGER_HOST_DEVICE Raw<T> load(int i, int n) const {
    RANGER_ASSUME_GLOBAL(first_);
    if (aligned_ && n >= kPack) return *reinterpret_cast<const Raw<T>*>(first_ + i);
    Raw<T> raw;
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) {
      if (j < n) raw.put(j, first_[i + j]);
    }
    return raw;
  }

  RANGER_HOST_DEVICE void store(int i, int n, const Raw<T>& raw) const {
    RANGER_ASSUME_GLOBAL(first_);
    if (aligned_ && n >= kPack) {
      *reinterpret_cast<Raw<T>*>(first_ + i) = raw;
      return;
    }
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) {
      if (j < n) first_[i + j] = raw.get(j);
    }
  }

 private:
  T* first_;
  bool aligned_;
};

template <typename T>
class Scattered {
 public:
  RANGER_HOST_DEVICE Scattered(const DeviceRow& row, const void* base, int tensor, int64_t begin)
      : base_(static_cast<T*>(const_cast<void*>(base))),
        layout_(row.layout),
        tensor_(tensor),
        begin_(begin) {}

  RANGER_HOST_DEVICE Raw<T> load(int i, int n) const {
    RANGER_ASSUME_GLOBAL(base_);
    T values[kPack] = {};
    RANGER_UNROLL(1)
    for (int k = 0; k < kPack; ++k) {
      T next = {};
      if (k < n) next = base_[strided_offset(layout_, tensor_, begin_ + i + k)];
      shift(values);
      values[kPack - 1] = next;
    }
    Raw<T> raw;
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) raw.put(j, values[j]);
    return raw;
  }

  RANGER_HOST_DEVICE void store(int i, int n, const Raw<T>& raw) const {
    RANGER_ASSUME_GLOBAL(base_);
    T values[kPack];
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) values[j] = raw.get(j);
    RANGER_UNROLL(1)
    for (int k = 0; k < kPack; ++k) {
      if (k < n) base_[strided_offset(layout_, tensor_, begin_ + i + k)] = values[0];
      shift(values);
    }
  }

 private:
  // A loop that is not unrolled cannot index registers.
  static RANGER_HOST_DEVICE void shift(T (&values)[kPack]) {
    RANGER_UNROLL()
    for (int j = 0; j + 1 < kPack; ++j) values[j] = values[j + 1];
  }

  T* base_;
  const int64_t* layout_;
  int tensor_;
  int64_t begin_;
};

// --- values --------------------------------------------------------------------------------------

using Values = Pack<float, kPack>;

// Where a thread is in a row, and the row.
template <class Thread>
struct Place {
  const Thread& thread;
  const DeviceRow& row;
  int64_t begin;  // of the block's elements
  int i;          // of the thread's, from there on
  int n;          // how many of kPack there are, if any

  RANGER_HOST_DEVICE unsigned group() const { return static_cast<unsigned>(i) / kGroup; }
};

// The random words of a thread's elements.
struct Words {
  uint32_t words[kPack];
  int shift;

  template <class Thread>
  RANGER_HOST_DEVICE Words(const Place<Thread>& at, const RandomBits& bits) : shift(bits.shift) {
    const uint32_t first = static_cast<uint32_t>(at.row.first + at.begin) + at.i;
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) words[j] = bits.word_of(first + j);
  }
  RANGER_HOST_DEVICE Random16 of(int j) const { return {words[j], shift}; }
};

// A thread's elements of a stream as they lie in memory.
template <class Codec>
struct Fetched {
  Raw<typename Codec::Stored> stored;
  Raw<typename Codec::Rest> rest;  // of a group: the scale, in the first
};

// What lies beside a stream; nothing, for some codecs.
template <class Codec, template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE Raw<typename Codec::Rest> fetch_rest(const Place<Thread>& at, int stream) {
  using Rest = typename Codec::Rest;
  const void* const beside = at.row.data[kRestOf + stream];
  Raw<Rest> rest;
  if constexpr (Codec::kIsGrouped) {
    const auto* const scales = static_cast<const Rest*>(beside) + at.begin / kGroup;
    RANGER_ASSUME_GLOBAL(scales);
    if (at.n > 0) rest.words[0] = scales[at.group()];
  } else if constexpr (!std::is_same_v<Rest, NoRest>) {
    rest = Elements<Rest>(at.row, beside, kRestOf + stream, at.begin).load(at.i, at.n);
  }
  return rest;
}

template <class Codec, template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE Fetched<Codec> fetch(const Place<Thread>& at, int stream) {
  const Elements<typename Codec::Stored> elements(at.row, at.row.data[stream], stream, at.begin);
  return {elements.load(at.i, at.n), fetch_rest<Codec, Elements>(at, stream)};
}

template <class Codec>
RANGER_HOST_DEVICE Values decode(const Fetched<Codec>& from) {
  Values values;
  if constexpr (Codec::kIsGrouped) {
    by_scale(static_cast<uint8_t>(from.rest.words[0]), [&](const auto& times) {
      RANGER_UNROLL()
      for (int j = 0; j < kPack; ++j) {
        values.values[j] = Codec::decode(from.stored.words[j / 4] << (24 - j % 4 * 8), times);
      }
    });
  } else {
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) {
      values.values[j] = Codec::template decode<float>(from.stored.get(j), from.rest.get(j));
    }
  }
  return values;
}

// Elements beyond the last are 0, or as infinite as the step is: they make no group's maximum.
template <class Codec, template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE void store(const Place<Thread>& at, int stream, const Values& values,
                              const Words& random) {
  using Stored = typename Codec::Stored;
  using Rest = typename Codec::Rest;
  void* const beside = at.row.data[kRestOf + stream];
  Raw<Stored> stored;
  if constexpr (Codec::kIsGrouped) {
    uint32_t largest = 0;
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) {
      const uint32_t magnitude = Codec::magnitude_of(values.values[j]);
      largest = magnitude > largest ? magnitude : largest;
    }
    const Rest scale = scale_of(at.thread.largest_of(largest));
    uint32_t codes[kPack];
    by_scale(scale, [&](const auto& times) {
      RANGER_UNROLL()
      for (int j = 0; j < kPack; ++j) {
        codes[j] = Codec::encode(values.values[j], random.of(j), times);
      }
    });
    RANGER_UNROLL()
    for (int j = 0; j < kPack; j += 4) {
      stored.words[j / 4] = upper_bytes(codes[j], codes[j + 1], codes[j + 2], codes[j + 3]);
    }
    auto* const scales = static_cast<Rest*>(beside) + at.begin / kGroup;
    RANGER_ASSUME_GLOBAL(scales);
    if (at.n > 0 && at.i % kGroup == 0) scales[at.group()] = scale;
  } else {
    Raw<Rest> rest;
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) {
      Stored element;
      Rest other;
      Codec::encode(values.values[j], random.of(j), element, other);
      stored.put(j, element);
      rest.put(j, other);
    }
    if constexpr (!std::is_same_v<Rest, NoRest>) {
      Elements<Rest>(at.row, beside, kRestOf + stream, at.begin).store(at.i, at.n, rest);
    }
  }
  Elements<Stored>(at.row, at.row.data[stream], stream, at.begin).store(at.i, at.n, stored);
}

template <template <typename> class Elements, class Thread>
RANGER_HOST_DEVICE Values load_grad(const Place<Thread>& at, const void* grad) {
  return by_grad_dtype(static_cast<DType>(at.row.grad_dtype), [&](auto zero) {
    using Stored = decltype(zero);
    const Elements<Stored> elements(at.row, grad, kGrad, at.begin);
    const Raw<Stored> stored = elements.load(at.i, at.n);
    Values values;
    RANGER_UNROLL()
    for (int j = 0; j < kPack; ++j) {
      values.values[j] = Plain<Stored>::template decode<float>(stored.get(j));
    }
    return values;
  });
}

}  // namespace ranger::cuda
