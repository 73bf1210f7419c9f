// The normal distribution's Phi and density, for one instruction set.
#pragma once

#include "simd.h"

namespace perceiver_fast {
namespace PF_ISA {

template <class T>
struct Normal {
  typename Simd<T>::Vec below, density;  // Phi(g), phi(g)
};

constexpr double kInverseSqrt2 = 0.70710678118654752440, kInverseSqrt2Pi = 0.39894228040143267794;

// Both share e = exp(-g^2 / 2): with a = |g| and s = 1 / (1 + 0.297 a), Phi(-a) = e s p(s). The form has the tail's decay
// and its 1 / a, so it keeps relative accuracy where 1 + erf has none left.
//
// p is a minimax polynomial (Remez in 40-digit arithmetic, for a up to 14: beyond it e is zero) of the relative error,
// weighted by max(2 Phi(-a), 1/32): 9.4e-9 of that, so 4.7e-9 absolute. In float, with exp2's error, Phi is within
// 9e-8 absolute; the tail's relative error grows with the exponent's rounding, to some 1e-5.
PF_INLINE Normal<float> normal(Simd<float>::Vec g) {
  using S = Simd<float>;
  constexpr float kHalfLog2OfE = 0.72134752044f;
  const S::Vec a = (S::Vec)((S::IntVec)g & 0x7fffffff);
  const S::Vec e = exp2<float, false>(a * a * -kHalfLog2OfE, S::Vec{});
  const S::Vec s = 1.0f / (a * 0.297f + 1.0f);
  S::Vec p = s * 0.0362033127709f - 0.16429537003f;
  p = p * s + 0.22681910032f;
  p = p * s - 0.0705754818082f;
  p = p * s + 0.136807167628f;
  p = p * s + 0.0967480097019f;
  p = p * s + 0.119879123127f;
  p = p * s + 0.118414142949f;
  const S::Vec tail = e * (s * p);
  return {g < 0.0f ? tail : 1.0f - tail, e * float(kInverseSqrt2Pi)};
}

// In double the library's functions do: this path is for checks.
PF_INLINE Normal<double> normal(Simd<double>::Vec g) {
  Normal<double> result;
  for (int i = 0; i < Simd<double>::lanes; ++i) {
    result.below[i] = 0.5 * __builtin_erfc(-kInverseSqrt2 * g[i]);
    result.density[i] = kInverseSqrt2Pi * __builtin_exp(-0.5 * (g[i] * g[i]));
  }
  return result;
}

}  // namespace PF_ISA
}  // namespace perceiver_fast
