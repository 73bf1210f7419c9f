// Vectors of one instruction set, for kernels that are compiled once for every instruction set.
//
// setup.py compiles each *_kernels.cpp several times, with PF_ISA (the name of a namespace), PF_VECTOR_BYTES, and the
// compiler's flags for that instruction set. Everything here lives in that namespace, so that the linker never takes a
// function made for one instruction set for the same function made for another. A template of the standard library is
// in no such namespace: kernels use none.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PF_INLINE inline __attribute__((always_inline))

namespace perceiver_fast {
namespace PF_ISA {

template <class T>
struct Simd;

#define PF_DEFINE_SIMD(T, INT)                                                                   \
  template <>                                                                                    \
  struct Simd<T> {                                                                               \
    using Int = INT;                                                                             \
    typedef T Vec __attribute__((vector_size(PF_VECTOR_BYTES)));                                 \
    typedef INT IntVec __attribute__((vector_size(PF_VECTOR_BYTES)));                            \
    typedef T Unaligned __attribute__((vector_size(PF_VECTOR_BYTES), aligned(1), may_alias));          \
    static constexpr int lanes = PF_VECTOR_BYTES / sizeof(T);                                    \
    static inline Vec load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }        \
    static inline void store(T* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }              \
    static inline Vec set(T x) { return x - Vec{}; } /* x - 0 is x, also for -0 and NaN */       \
    static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }                                \
  };
PF_DEFINE_SIMD(float, int32_t)
PF_DEFINE_SIMD(double, int64_t)
#undef PF_DEFINE_SIMD

// a * b + c, rounded once where there is an instruction for it: written out where two kernels must agree to the last
// bit, since a compiler that fuses on its own may choose either product of a * b + c * d.
#if PF_VECTOR_BYTES == 64
PF_INLINE Simd<float>::Vec fma(Simd<float>::Vec a, Simd<float>::Vec b, Simd<float>::Vec c) {
  return (Simd<float>::Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
PF_INLINE Simd<double>::Vec fma(Simd<double>::Vec a, Simd<double>::Vec b, Simd<double>::Vec c) {
  return (Simd<double>::Vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif PF_VECTOR_BYTES == 32
PF_INLINE Simd<float>::Vec fma(Simd<float>::Vec a, Simd<float>::Vec b, Simd<float>::Vec c) {
  return (Simd<float>::Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
PF_INLINE Simd<double>::Vec fma(Simd<double>::Vec a, Simd<double>::Vec b, Simd<double>::Vec c) {
  return (Simd<double>::Vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
PF_INLINE Simd<float>::Vec fma(Simd<float>::Vec a, Simd<float>::Vec b, Simd<float>::Vec c) {
  return (Simd<float>::Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
PF_INLINE Simd<double>::Vec fma(Simd<double>::Vec a, Simd<double>::Vec b, Simd<double>::Vec c) {
  return (Simd<double>::Vec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <class V>
PF_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#endif

// Coefficients, highest power first, of minimax polynomials for 2^f (Remez on the relative error, in 60-digit
// arithmetic): error 7.5e-8 for float, 3e-18 for double before rounding. `floor` is for f in [0, 1), what AVX-512 has
// an instruction for, `nearest` for f in [-1/2, 1/2].
template <class T>
struct Exp2Coefficients;
template <>
struct Exp2Coefficients<float> {
  static constexpr float floor[] = {0.001877576766f, 0.008989339877f, 0.05582631823f,
                                    0.240153617f,    0.6931530732f,   0.9999999251f};
  static constexpr float nearest[] = {0.001327647263f, 0.009675541343f, 0.05550713272f,
                                      0.2402211972f,   0.6931469671f,   1.000000072f};
};
template <>
struct Exp2Coefficients<double> {
  static constexpr double floor[] = {6.27243695713783512e-10, 6.5544557738570504e-9,   1.02544577142324723e-7,
                                     1.320819344985004e-6,    1.52531902525511925e-5,  1.54035114462742881e-4,
                                     1.33335586615834706e-3,  9.61812909879244896e-3,  5.55041086657111632e-2,
                                     0.240226506959054712,    0.693147180559946235,    0.999999999999999997};
  static constexpr double nearest[] = {4.43528270695727715e-10, 7.0741056135081428e-9,   1.01781980216719308e-7,
                                       1.32154330896763992e-6,  1.52527334899885256e-5,  1.54035304625144321e-4,
                                       1.33335581467899217e-3,  9.61812910758833524e-3,  5.55041086648199216e-2,
                                       0.240226506959101562,    0.69314718055994533,     0.999999999999999997};
};

template <class T>
PF_INLINE typename Simd<T>::Vec exp2_polynomial(typename Simd<T>::Vec f) {
  constexpr auto& c = PF_VECTOR_BYTES == 64 ? Exp2Coefficients<T>::floor : Exp2Coefficients<T>::nearest;
  typename Simd<T>::Vec p = f * c[0] + c[1];
  for (unsigned i = 2; i < sizeof(c) / sizeof(T); ++i) p = p * f + c[i];
  return p;
}

// exp2<T, Shifted>(t, n): 2^t, or with Shifted 2^(t + n) for an integral n. The fraction is taken from t alone, so n
// changes the exponent and costs no precision.
//
// Max relative error: 2.4e-7 for float (1.8e-7 with AVX-512), 2.2e-16 for double. 2^0 is one up to that, too.
// Valid range: all t. Results below the normal numbers are zero where denormals are flushed (FlushDenormals). They are
// infinite from 2^128 on (double: 2^1024), without AVX-512 from 2^127.5 (2^1023.5) on.
// Special values: -inf gives 0 and NaN gives NaN; inf gives inf, and with Shifted, unless AVX-512, NaN.
// tests/core/functions.cpp holds all of this.
#if PF_VECTOR_BYTES == 64
PF_INLINE Simd<float>::Vec fraction(Simd<float>::Vec t) {
  return (Simd<float>::Vec)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
PF_INLINE Simd<double>::Vec fraction(Simd<double>::Vec t) {
  return (Simd<double>::Vec)_mm512_reduce_pd((__m512d)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
PF_INLINE Simd<float>::Vec scale_by_power(Simd<float>::Vec p, Simd<float>::Vec n) {  // p * 2^floor(n)
  return (Simd<float>::Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
}
PF_INLINE Simd<double>::Vec scale_by_power(Simd<double>::Vec p, Simd<double>::Vec n) {
  return (Simd<double>::Vec)_mm512_scalef_pd((__m512d)p, (__m512d)n);
}

template <class T, bool Shifted>
PF_INLINE typename Simd<T>::Vec exp2(typename Simd<T>::Vec t, typename Simd<T>::Vec n) {
  const typename Simd<T>::Vec f = fraction(t);
  return scale_by_power(exp2_polynomial<T>(f), Shifted ? (t - f) + n : t);
}
#else
template <class T>
struct FloatBits;
template <>
struct FloatBits<float> {
  static constexpr float round = 12582912.0f, least = -127.0f, most = 128.0f, large = 4194304.0f, huge = 3e38f;
  static constexpr int32_t round_bits = 0x4b400000, bias = 127, mantissa = 23;
};
template <>
struct FloatBits<double> {
  static constexpr double round = 6755399441055744.0, least = -1023.0, most = 1024.0, large = 2251799813685248.0,
                          huge = 1e308;
  static constexpr int64_t round_bits = 0x4338000000000000LL, bias = 1023, mantissa = 52;
};

// Adding round = 1.5 * 2^mantissa to a number rounds it to an integer, which then stands in the low bits of the sum;
// moved up into the exponent's place, it makes a power of two.
template <class T, bool Shifted>
PF_INLINE typename Simd<T>::Vec exp2(typename Simd<T>::Vec t, typename Simd<T>::Vec shift) {
  using S = Simd<T>;
  using B = FloatBits<T>;
  using V = typename S::Vec;
  if (!Shifted) {  // to where the power is zero or infinity; a comparison with NaN is false, so NaN stays
    t = t < B::least ? S::set(B::least) : t;
    t = t > B::most ? S::set(B::most) : t;
  }
  if (Shifted) {
    // Too large to be rounded so, a half or an integer: here the shift costs no digit of a sum that is no zero.
    const auto large = (t > B::large) | (t < -B::large);
    t = large ? t + shift : t;
    shift = large ? V{} : shift;
    t = t < -B::huge ? S::set(-B::huge) : t;  // -inf, a masked token: t - k would be NaN
  }
  V k = (t + B::round) - B::round;
  const V p = exp2_polynomial<T>(t - k);
  if (Shifted) {
    k += shift;
    k = k < B::least ? S::set(B::least) : k;
    k = k > B::most ? S::set(B::most) : k;
  }
  const V z = k + B::round;
  typename S::IntVec n;
  std::memcpy(&n, &z, sizeof n);
  n = (n - B::round_bits + B::bias) << B::mantissa;
  V power;
  std::memcpy(&power, &n, sizeof power);
  return p * power;
}
#endif

// 2^t for t in [-127, 127] (double: [-1023, 1023]), with the errors of exp2: without its tests for what is beyond. 2^-127
// (2^-1023) is zero; NaN stays NaN.
template <class T>
PF_INLINE typename Simd<T>::Vec exp2_within(typename Simd<T>::Vec t) {
#if PF_VECTOR_BYTES == 64
  return exp2<T, false>(t, typename Simd<T>::Vec{});
#else
  using B = FloatBits<T>;
  constexpr T round = B::round + B::bias;  // so that the exponent's bias stands in the low bits already
  const typename Simd<T>::Vec z = t + round;
  typename Simd<T>::IntVec n;
  std::memcpy(&n, &z, sizeof n);
  n <<= B::mantissa;
  typename Simd<T>::Vec power;
  std::memcpy(&power, &n, sizeof power);
  return exp2_polynomial<T>(t - (z - round)) * power;
#endif
}

// The least t whose 2^t exp2_within computes.
template <class T>
constexpr T kLeastExponent = sizeof(T) == 8 ? -1023 : -127;

// Flushes denormals to zero while a kernel runs and restores the caller's mode afterwards. They cost a hundred cycles
// each, and in these kernels they are only ever weights below 2^-126 of the largest.
class [[maybe_unused]] FlushDenormals {  // does nothing but on x86
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace PF_ISA
}  // namespace perceiver_fast
