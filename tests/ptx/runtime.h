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

// To nearest, ties to even: of the value in units of its last place.
inline b16 to_half(f32 value) {
  const b16 sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7fff;
  const int exponent = std::isinf(value) ? 0 : std::max(std::ilogb(value), -14);
  const f64 places = std::nearbyint(std::ldexp(std::abs(f64(value)), 10 - exponent));
  const f64 bits = places + 1024 * (exponent + 14);  // a carry goes on into the exponent
  return sign | b16(std::isinf(value) || bits > 0x7c00 ? 0x7c00 : bits);
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

// An operation on both 16-bit halves.
template <class Operation>
b32 half_by_half(b32 a, b32 b, Operation apply) {
  const auto half = [&](int shift) {
    return b32(b16(apply(static_cast<s16>(a >> shift), static_cast<s16>(b >> shift)))) << shift;
  };
  return half(0) | half(16);
}

template <class T>
T shift_left(T value, u32 by) {
  return by >= 8 * sizeof(T) ? T(0) : T(value << by);
}

template <class T>
T shift_right(T value, u32 by) {
  return T(value >> std::min<u32>(by, 8 * sizeof(T) - 1) >> (by >= 8 * sizeof(T)));
}

// `count` bits from bit `first` on.
inline u32 extract(u32 value, u32 first, u32 count) {
  return shift_right(value, first) & ~shift_left(~u32(0), count);
}

// The lowest `count` bits of `a` in place of as many of `b`, from bit `first` on.
inline b64 insert(b64 a, b64 b, u32 first, u32 count) {
  const b64 mask = shift_left(count < 64 ? (b64(1) << count) - 1 : ~b64(0), first);
  return (shift_left(a, first) & mask) | (b & ~mask);
}

// Four bytes of two registers, the second's the upper ones; 8 in a digit of `which`: a byte of
// that one's sign.
inline b32 permute(b32 a, b32 b, b32 which) {
  const b64 both = b64(b) << 32 | a;
  b32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const b32 digit = which >> 4 * i & 15;
    const b8 byte = static_cast<b8>(both >> 8 * (digit & 7));
    result |= b32(digit & 8 ? (byte >> 7) * 0xff : byte) << 8 * i;
  }
  return result;
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
  // What the thread of its warp that `lane` says has given; all of the warp ask at once.
  b32 shuffle(int site, b32 given, u32 lane, bool whole_warps);
  // The largest that a thread of its warp has given.
  u32 largest(int site, u32 given, bool whole_warps) {
    for (u32 apart = kWarp / 2; apart > 0; apart /= 2) {
      given = std::max(given, shuffle(site, given, lane() ^ apart, whole_warps));
    }
    return given;
  }
  u32 lane() const { return index % kWarp; }

  static constexpr u32 kWarp = 32;

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
  bool waits;  // for other threads, at a barrier or to shuffle
};

}  // namespace ptx
