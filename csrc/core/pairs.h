// Operands of multiply-adds as a block holds them. Numbers stand one by one, bfloat16 in pairs of two neighbours along the
// sum: x86's vdpbf16ps multiplies two by two and adds both products to a float, at twice the rate of a float's
// multiply-add on AMD's Zen 4, where it was measured.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"

// Kernels of every instruction set use these functions, and a linker may take only one of copies of a function.
#define PF_ALWAYS_INLINE inline __attribute__((always_inline))

namespace perceiver_fast {

struct Pair {
  BFloat16 first, second;
};

template <class X>
struct Operand {
  using type = X;
  static constexpr int64_t numbers = 1;  // of an operand
};
template <>
struct Operand<BFloat16> {
  using type = Pair;
  static constexpr int64_t numbers = 2;
};
template <class X>
using OperandOf = typename Operand<X>::type;
template <class X>
using ComputeOf = typename ComputeType<X>::type;

// How many operands hold `count` numbers.
template <class X>
PF_ALWAYS_INLINE int64_t operands(int64_t count) {
  return (count + Operand<X>::numbers - 1) / Operand<X>::numbers;
}

template <class T>
PF_ALWAYS_INLINE T widened(T x) {
  return x;
}
PF_ALWAYS_INLINE float widened(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Rounded to nearest, ties to even; NaN stays NaN.
template <class X>
PF_ALWAYS_INLINE X narrowed(ComputeOf<X> x) {
  return x;
}
template <>
PF_ALWAYS_INLINE BFloat16 narrowed<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  return {uint16_t(bits >> 16)};
}

}  // namespace perceiver_fast
