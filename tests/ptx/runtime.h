// What translated kernels (translate.py) run on: threads that say where they are, their memory, and
// the operations of PTX that C++ has no sign for. Registers hold bits, and operations say of what.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace ptx {

using pred = bool;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using b8 = uint8_t;
using b16 = uint16_t;
using b32 = uint32_t;
using b64 = uint64_t;
using f32 = float;
using f64 = double;

// --- registers ---------------------------------------------------------------------------------

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T, class Register>
T get(Register bits) {
  if constexpr (std::is_floating_point_v<T>) {
    return same_bits<T>(bits);
  } else {
    return static_cast<T>(bits);
  }
}

// Where the register is wider, the value is extended as its type says.
template <class T, class Register>
void put(Register& bits, T value) {
  if constexpr (std::is_floating_point_v<T>) {
    bits = same_bits<Register>(value);
  } else {
    bits = static_cast<Register>(value);
  }
}

// --- operations --------------------------------------------------------------------------------

// The value of a float16: exact.
inline f32 from_half(b16 bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const f32 size = exponent == 0   ? std::ldexp(f32(fraction), -24)
                   : exponent < 31 ? std::ldexp(f32(1024 + fraction), exponent - 25)
                   : fraction == 0 ? f32(INFINITY)
                                   : f32(NAN);
  return bits >> 15 ? -size : size;
}

// An operation on both floats of a register.
template <class Operation>
b64 pairwise(b64 a, b64 b, Operation apply) {
  const auto half = [&](int shift) {
    const f32 result = apply(get<f32>(b32(a >> shift)), get<f32>(b32(b >> shift)));
    return b64(same_bits<b32>(result)) << shift;
  };
  return half(0) | half(32);
}

template <class T>
T shift_left(T value, u32 by) {
  return by >= 8 * sizeof(T) ? T(0) : T(value << by);
}

template <class T>
T shift_right(T value, u32 by) {
  return T(value >> std::min<u32>(by, 8 * sizeof(T) - 1) >> (by >= 8 * sizeof(T)));
}

// By zero they are unspecified, and a kernel may compute what it does not use.
template <class T>
T divide(T a, T b) {
  if (b == 0) return T(-1);
  return std::is_signed_v<T> && b == T(-1) ? T(-a) : T(a / b);
}

template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
}

// Towards zero; to the nearest there is where it does not fit.
inline s64 truncate(f32 value) {
  constexpr f32 kEnd = 0x1p63f;
  if (std::isnan(value) || value < -kEnd) return std::numeric_limits<s64>::min();
  return value >= kEnd ? std::numeric_limits<s64>::max() : static_cast<s64>(value);
}

// --- threads -----------------------------------------------------------------------------------

// What a GPU would stop for, or do wrong without a word.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Space { global, shared, param };

class Block;

struct Access {
  Space space;
  u64 address;
  u32 size;
  int site;  // which of the kernel's instructions
  bool store;
};

class Thread {
 public:
  u32 index, block, threads, blocks;

  Thread(u32 index, Block& its, u32 block, u32 threads, u32 blocks)
      : index(index), block(block), threads(threads), blocks(blocks), its_(its) {}

  template <class T, int kCount>
  std::array<T, kCount> load(Space space, u64 address, int site) {
    std::array<T, kCount> read;
    std::memcpy(&read, locate({space, address, sizeof(read), site, false}), sizeof(read));
    return read;
  }

  template <class T, int kCount>
  void store(Space space, u64 address, int site, const std::array<T, kCount>& values) {
    std::memcpy(locate({space, address, sizeof(values), site, true}), &values, sizeof(values));
  }

  void barrier(int site);

 private:
  char* locate(const Access& access);

  Block& its_;
};

struct Parameter {
  u32 offset, size;
};

struct Kernel {
  std::string name;
  void (*run)(Thread&);
  std::vector<Parameter> parameters;
  u32 shared_size;
  u32 most_threads;
  bool has_barrier;
};

}  // namespace ptx
