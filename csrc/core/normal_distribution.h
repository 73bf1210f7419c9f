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

// Phi and the density share e = exp(-g^2 / 2): with a = |g| and t = 0.29 a / (1 + 0.29 a), Phi(-a) = e (1/2 + t q(t)).
// This form decays as the tail does, so it has digits where 1 + erf has lost all of them; and near zero t is small, so
// that q's rounding hardly matters. q is a minimax polynomial for a up to 14, beyond which e is zero (Remez in 40-digit
// arithmetic, on the relative error weighted by max(2 Phi(-a), 1/32): 4.8e-9 before rounding).
//
// Max error of Phi: 1.5e-7; below zero, down to g = -12, relative 1e-5 (most of it is the rounding of e's exponent).
// Max error of g Phi(g), which is GELU: 1.5e-7 |g|. Max error of the density: 1e-7.
// Valid range: all g. Special values: infinities give 0 or 1, and a density of 0; NaN gives NaN.
// tests/core/functions.cpp holds all of this.
PF_INLINE Normal<float> normal(Simd<float>::Vec g) {
  using S = Simd<float>;
  constexpr float kHalfLog2OfE = 0.72134752044f;
  S::Vec a = (S::Vec)((S::IntVec)g & 0x7fffffff);
  a = a > 20.0f ? S::set(20.0f) : a;  // where e is zero; infinity over itself would be NaN
  const S::Vec e = exp2<float, false>(a * a * -kHalfLog2OfE, S::Vec{});
  const S::Vec s = a * 0.29f, t = s / (1.0f + s);
  S::Vec q = t * 0.0389858634867f - 0.120657597625f;
  q = q * t + 0.0560960812146f;
  q = q * t + 0.162344341872f;
  q = q * t + 0.0251766298173f;
  q = q * t - 0.88327060472f;
  q = q * t + 1.59701145338f;
  q = q * t - 1.37566345501f;
  const S::Vec tail = e * (q * t + 0.5f);
  return {g < 0.0f ? tail : 1.0f - tail, e * float(kInverseSqrt2Pi)};
}

// In double the library's functions do, lane by lane, with their error and range: float64 is for checks.
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
