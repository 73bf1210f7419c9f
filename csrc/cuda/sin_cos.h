// sin(pi t) and cos(pi t) of a phase t = position * frequency, on the device and, for tests, on the host.
//
// A float32 phase would lose digits at high frequencies (at t = 100 its spacing alone is 1e-5 half turns), so the phase
// is reduced in double and only what remains of it is rounded: t = n/2 + rest with |rest| <= 1/4, then polynomials of
// the rest and n's last two bits for the quadrant. That is three float64 operations for a sine and a cosine. A100 and
// H100 run them at half the float32 rate; consumer cards at 1/64, where they cost about as much as 200 multiply-adds
// and so outweigh the product, in which a sine and a cosine meet 128 of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PF_HOST_DEVICE inline
#endif

namespace perceiver_fast {

// Last bits of the integer that a double of magnitude 2^51..2^52 holds in halves.
PF_HOST_DEVICE int count_of_halves(double shifted) {
#ifdef __CUDA_ARCH__
  return __double2loint(shifted);
#else
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return int(bits);
#endif
}

// rest = t - n/2 with n = rint(2 t), where t = position * frequency is not rounded itself. Adding 1.5 * 2^51, whose
// last bit is worth a half, rounds to halves and leaves n in the low word, so no conversion is needed. For |t| < 2^50:
// above, a double cannot tell halves.
PF_HOST_DEVICE double reduce_phase(double position, double frequency, int& n) {
  const double magic = 3377699720527872.0;
  const double shifted = fma(position, frequency, magic);
  n = count_of_halves(shifted);
  return fma(position, frequency, magic - shifted);
}

// sin(pi r) and cos(pi r) for |r| <= 1/4, by polynomials that interpolate at Chebyshev nodes: 5e-11 and 2e-10 off in
// float32 before rounding, 2e-20 and 1e-19 in float64. pi is a sum of two constants, so that a sine near zero keeps its
// digits.
PF_HOST_DEVICE void sin_cos_pi_small(float r, float& sine, float& cosine) {
  const float u = r * r;
  float s = fmaf(u, 0.08122956722f, -0.59922879548f);
  s = fmaf(u, s, 2.55016359350f);
  s = fmaf(u, s, -5.16771277918f);
  s = fmaf(u, s, -8.742278000e-8f);
  sine = fmaf(r, 3.14159274101f, r * s);
  float c = fmaf(u, 0.23212538851f, -1.33513781191f);
  c = fmaf(u, c, 4.05871056568f);
  c = fmaf(u, c, -4.93480219750f);
  cosine = fmaf(u, c, 1.0f);
}

PF_HOST_DEVICE void sin_cos_pi_small(double r, double& sine, double& cosine) {
  const double u = r * r;
  double s = fma(u, -0.000021742065961493964536, 0.00046628793237738074159);
  s = fma(u, s, -0.0073704303122796502548);
  s = fma(u, s, 0.08214588659727632008);
  s = fma(u, s, -0.59926452932064781215);
  s = fma(u, s, 2.5501640398773448804);
  s = fma(u, s, -5.1677127800499700289);
  s = fma(u, s, 1.2246467991473531772e-16);
  sine = fma(r, 3.141592653589793116, r * s);
  double c = fma(u, -0.00010370082224981258046, 0.0019294938736116353201);
  c = fma(u, c, -0.025806887964619842006);
  c = fma(u, c, 0.23533063028398982956);
  c = fma(u, c, -1.3352627688538094102);
  c = fma(u, c, 4.0587121264167651713);
  c = fma(u, c, -4.9348022005446793075);
  cosine = fma(u, c, 1.0);
}

// sin(pi t) and cos(pi t) of t = position * frequency.
//
// Max error, in proportion to the next power of two above the result: 9.6e-8 for float32, 3.4e-16 for float64
// (tests/ops/test_fourier_projection_emulated.py holds it).
// Valid range: |t| < 2^50. Special values: an infinite or NaN position or frequency gives NaN.
template <class T>
PF_HOST_DEVICE void sin_cos_pi(double position, double frequency, T& sine, T& cosine) {
  int n;
  const T rest = T(reduce_phase(position, frequency, n));
  T s, c;
  sin_cos_pi_small(rest, s, c);
  const T a = n & 1 ? c : s, b = n & 1 ? s : c;
  sine = n & 2 ? -a : a;
  cosine = (n + 1) & 2 ? -b : b;
}

}  // namespace perceiver_fast
