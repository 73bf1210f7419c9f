// Sines and cosines of a tile of positions, and the gradient of the positions, for one instruction set.
//
// With u = 2 p f, in quarter periods: n = rint(u), x = u - n in [-1/2, 1/2], and sin and cos of (pi/2) x, swapped and
// negated by n mod 4, are those of pi p f. Product and reduction are in double, and exact where multiply-adds are
// fused, so the float that the polynomials see is right to its last bit however high the frequency.
#pragma once

#include "fourier_projection_tile.h"
#include "simd.h"

namespace perceiver_fast {
namespace PF_ISA {

using Doubles = Simd<double>::Vec;
using Floats = Simd<float>::Vec;
using Words = Simd<float>::IntVec;

constexpr double kPi = 3.14159265358979323846;
constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves rint(u) in the low bits

// x and, as n + kRound, n of the comment above.
PF_INLINE void quarter_periods(Doubles twice_p, Doubles f, Doubles& x, Doubles& n) {
  n = fma(twice_p, f, Simd<double>::set(kRound));
  x = fma(twice_p, f, kRound - n);
}

// Two vectors of doubles as one of floats, and the low words of two vectors of doubles.
#if PF_VECTOR_BYTES == 64
PF_INLINE Floats narrow(Doubles a, Doubles b) {
  const __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)a));
  return (Floats)_mm512_insertf32x8(low, _mm512_cvtpd_ps((__m512d)b), 1);
}
PF_INLINE Words low_words(Doubles a, Doubles b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return (Words)_mm512_permutex2var_epi32((__m512i)a, even, (__m512i)b);
}
#elif PF_VECTOR_BYTES == 32
PF_INLINE Floats narrow(Doubles a, Doubles b) {
  return (Floats)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)b), _mm256_cvtpd_ps((__m256d)a));
}
PF_INLINE Words low_words(Doubles a, Doubles b) {
  const __m256 even = _mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);  // a and b alternate by pairs
  return (Words)_mm256_permute4x64_epi64((__m256i)even, 0xd8);
}
#else
PF_INLINE Floats narrow(Doubles a, Doubles b) {
  constexpr int half = Simd<double>::lanes;
  Floats all{};
  for (int i = 0; i < half; ++i) all[i] = float(a[i]), all[half + i] = float(b[i]);
  return all;
}
PF_INLINE Words low_words(Doubles a, Doubles b) {
  constexpr int half = Simd<double>::lanes;
  const auto low = (Simd<double>::IntVec)a, high = (Simd<double>::IntVec)b;
  Words all{};
  for (int i = 0; i < half; ++i) all[i] = int32_t(low[i]), all[half + i] = int32_t(high[i]);
  return all;
}
#endif

// sin and cos of pi p f for one vector of positions, given 2 p.
//
// Polynomials (Remez, 60-digit arithmetic): sin(pi/2 x) = x (kHalfPi + s(y)) with y = x^2, relative error 3.3e-9, and
// cos(pi/2 x) = 1 + y c(y), error 6e-11 before rounding. s holds what kHalfPi lacks of the constant term, so that a
// sine near zero is rounded only twice: x itself and the last addition.
//
// Max error: 9e-8, relative 1.7e-7; with fused multiply-adds 8e-8, relative 1.2e-7.
// Valid range: |p f| < 2^50. Without fused multiply-adds the phase is rounded, which adds 4e-16 |p f| to the error.
// Special values: phase 0 gives 0 and 1 exactly; an infinite or NaN position or frequency gives NaN.
// tests/core/functions.cpp holds all of this.
PF_INLINE void sin_cos(const double* twice_p, Doubles f, float* sine, float* cosine) {
  constexpr float kHalfPi = 0x1.921fb6p+0f;
  Doubles x_low, n_low, x_high, n_high;
  quarter_periods(Simd<double>::load(twice_p), f, x_low, n_low);
  quarter_periods(Simd<double>::load(twice_p + Simd<double>::lanes), f, x_high, n_high);
  const Floats x = narrow(x_low, x_high), y = x * x;
  const Words n = low_words(n_low, n_high);
  const Floats s = ((y * -0.00460165789118f + 0.0796800327704f) * y - 0.645963460233f) * y - 4.879794194e-8f;
  const Floats c = ((y * 0.000904021666258f - 0.0208602885059f) * y + 0.25366924403f) * y - 1.23370054335f;
  const Floats sin_x = fma(x, Simd<float>::set(kHalfPi), x * s), cos_x = fma(y, c, Simd<float>::set(1.0f));
  const Words odd = (n & 1) != 0;
  const Floats sin_n = odd ? cos_x : sin_x, cos_n = odd ? sin_x : cos_x;
  Simd<float>::store(sine, (Floats)((Words)sin_n ^ ((n & 2) << 30)));
  Simd<float>::store(cosine, (Floats)((Words)cos_n ^ (((n + 1) & 2) << 30)));
}

// In double the library's functions do, lane by lane: float64 is for checks. Max error: 1.2e-16, relative 4e-16; range
// and special values as above.
PF_INLINE void sin_cos(const double* twice_p, Doubles f, double* sine, double* cosine) {
  Doubles x, n;
  quarter_periods(Simd<double>::load(twice_p), f, x, n);
  const auto quarter = (Simd<double>::IntVec)n;
  for (int i = 0; i < Simd<double>::lanes; ++i) {
    const double s = __builtin_sin(kPi / 2 * x[i]), c = __builtin_cos(kPi / 2 * x[i]);
    const double sin_n = quarter[i] & 1 ? c : s, cos_n = quarter[i] & 1 ? s : c;
    sine[i] = quarter[i] & 2 ? -sin_n : sin_n;
    cosine[i] = (quarter[i] + 1) & 2 ? -cos_n : cos_n;
  }
}

// Codes of `count` tokens at positions [count][axes], [axes][2 bands + 1][kFourierTile]; lanes up to `width`, a whole
// number of vectors, are filled with the code of position 0.
template <class T>
void encode_positions(const FourierProjectionInput<T>& in, const double* positions, int64_t count, int64_t width,
                      T* codes) {
  alignas(64) double twice_p[kFourierTile];
  for (int64_t a = 0; a < in.axes; ++a) {
    const double* frequency = in.frequencies + a * in.bands;
    T *sine = codes + a * (2 * in.bands + 1) * kFourierTile, *cosine = sine + in.bands * kFourierTile;
    T* raw = cosine + in.bands * kFourierTile;
    for (int64_t t = 0; t < width; ++t) {
      const double p = t < count ? positions[t * in.axes + a] : 0;
      twice_p[t] = 2 * p;
      raw[t] = T(p);
    }
    for (int64_t k = 0; k < in.bands; ++k, sine += kFourierTile, cosine += kFourierTile) {
      const Doubles f = Simd<double>::set(frequency[k]);
      for (int64_t t = 0; t < width; t += Simd<T>::lanes) sin_cos(twice_p + t, f, sine + t, cosine + t);
    }
  }
}

// Gradient of the positions, [count][axes], from that of their codes: pi f (dsin cos - dcos sin) over all bands, plus
// the raw position's own. The sum is in double: it costs little and frequencies differ by orders of magnitude.
template <class T>
void position_gradient(const FourierProjectionInput<T>& in, const T* codes, const T* d_codes, int64_t count,
                       int64_t width, double* gradient) {
  for (int64_t a = 0; a < in.axes; ++a) {
    const int64_t first = a * (2 * in.bands + 1) * kFourierTile, cosines = in.bands * kFourierTile;
    double total[kFourierTile];
    for (int64_t t = 0; t < width; ++t) total[t] = d_codes[first + 2 * cosines + t];
    for (int64_t k = 0; k < in.bands; ++k) {
      const double factor = kPi * in.frequencies[a * in.bands + k];
      const T *sine = codes + first + k * kFourierTile, *cosine = sine + cosines;
      const T *d_sine = d_codes + first + k * kFourierTile, *d_cosine = d_sine + cosines;
      for (int64_t t = 0; t < width; ++t)
        total[t] += factor * (double(d_sine[t]) * double(cosine[t]) - double(d_cosine[t]) * double(sine[t]));
    }
    for (int64_t t = 0; t < count; ++t) gradient[t * in.axes + a] = total[t];
  }
}

}  // namespace PF_ISA
}  // namespace perceiver_fast
