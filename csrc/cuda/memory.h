// A stream's memory as a thread reads and writes it: values, several at a time.
#pragma once

#include <cstdint>

#include "../formats/formats.h"
#include "../rule/random.h"

namespace ranger::cuda {

// `kWidth` neighbouring elements; up to 16 bytes of them are one access.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Pack {
  T values[kWidth];
};

// Bits that nobody looks into.
template <typename T>
struct Bits {
  using Stored = T;
  template <typename>
  static RANGER_HOST_DEVICE T decode(T stored) {
    return stored;
  }
  static RANGER_HOST_DEVICE void encode(T value, Random16, T& stored, NoRest&) { stored = value; }
};

// A stream's memory from some element on, and its values. On a 16-byte boundary `kWidth` neighbours
// are one access; elsewhere they are one each, in the same thread.
template <class Codec, typename Value>
class Memory {
 public:
  using Stored = typename Codec::Stored;

  RANGER_HOST_DEVICE Memory(void* base, int64_t first)
      : first_(static_cast<Stored*>(base) + first),
        aligned_(reinterpret_cast<uintptr_t>(first_) % 16 == 0) {}

  template <int kWidth>
  RANGER_HOST_DEVICE Pack<Value, kWidth> load(int i) const {
    RANGER_ASSUME_GLOBAL(first_);
    Pack<Stored, kWidth> pack;
    if (aligned_) {
      pack = *reinterpret_cast<const Pack<Stored, kWidth>*>(first_ + i);
    } else {
      RANGER_UNROLL()
      for (int j = 0; j < kWidth; ++j) pack.values[j] = first_[i + j];
    }
    Pack<Value, kWidth> values;
    RANGER_UNROLL()
    for (int j = 0; j < kWidth; ++j)
      values.values[j] = Codec::template decode<Value>(pack.values[j]);
    return values;
  }

  template <int kWidth>
  RANGER_HOST_DEVICE void store(int i, const Pack<Value, kWidth>& values) const {
    RANGER_ASSUME_GLOBAL(first_);
    Pack<Stored, kWidth> pack;
    NoRest none;
    RANGER_UNROLL()
    for (int j = 0; j < kWidth; ++j) Codec::encode(values.values[j], {}, pack.values[j], none);
    if (aligned_) {
      *reinterpret_cast<Pack<Stored, kWidth>*>(first_ + i) = pack;
      return;
    }
    RANGER_UNROLL()
    for (int j = 0; j < kWidth; ++j) first_[i + j] = pack.values[j];
  }

 private:
  Stored* first_;
  bool aligned_;
};

// A gradient's memory: of any type, and, as a view of a flat bucket, on any boundary.
template <typename Value>
class GradMemory {
 public:
  RANGER_HOST_DEVICE GradMemory(const void* base, int64_t first, DType dtype)
      : base_(const_cast<void*>(base)), first_(first), dtype_(dtype) {}

  template <int kWidth>
  RANGER_HOST_DEVICE Pack<Value, kWidth> load(int i) const {
    RANGER_ASSUME_GLOBAL(base_);
    if (dtype_ == kDTypeOf<Value>) return as<Value>().template load<kWidth>(i);
    return by_grad_dtype(dtype_,
                         [&](auto zero) { return as<decltype(zero)>().template load<kWidth>(i); });
  }

 private:
  template <typename Stored>
  RANGER_HOST_DEVICE Memory<Plain<Stored>, Value> as() const {
    return {base_, first_};
  }

  void* base_;
  int64_t first_;
  DType dtype_;
};

// Where element `index` of a row lies in a tensor of it, in elements. A layout is the number of
// dimensions, their sizes, and then the strides of each tensor, all outermost first.
RANGER_HOST_DEVICE int64_t strided_offset(const int64_t* layout, int tensor, int64_t index) {
  RANGER_ASSUME_GLOBAL(layout);
  const int64_t ndim = layout[0];
  const int64_t* sizes = layout + 1;
  const int64_t* strides = sizes + ndim * (1 + tensor);
  int64_t offset = 0;
  RANGER_UNROLL(1)
  for (int64_t dim = ndim - 1; dim >= 0; --dim) {
    offset += index % sizes[dim] * strides[dim];
    index /= sizes[dim];
  }
  return offset;
}

}  // namespace ranger::cuda
