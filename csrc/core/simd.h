// Vectors of one instruction set, for the kernel headers that are compiled once per ISA.
//
// The including translation unit defines PF_ISA (a namespace name) and PF_VECTOR_BYTES and is compiled
// with that ISA's flags. Everything here lives in that namespace, so no code made for one ISA can be
// linked in for another; for the same reason nothing here uses a standard-library template.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
    typedef T Unaligned __attribute__((vector_size(PF_VECTOR_BYTES), aligned(alignof(T)), may_alias)); \
    static constexpr int lanes = PF_VECTOR_BYTES / sizeof(T);                                    \
    static inline Vec load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }        \
    static inline void store(T* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }              \
    static inline Vec set(T x) { return x - Vec{}; } /* x - 0 is x, also for -0 and NaN */       \
    static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }                                \
  };
PF_DEFINE_SIMD(float, int32_t)
PF_DEFINE_SIMD(double, int64_t)
#undef PF_DEFINE_SIMD

// 2^t. Minimax polynomials of the relative error (Remez, 60-digit arithmetic): 7.5e-8 for float
// (degree 5), 3e-18 for double (degree 11). Results below the normal range are zero, NaN stays NaN.
#if PF_VECTOR_BYTES == 64
// f = t - floor(t) in one instruction, and 2^floor(t) in another: no clamp, no integer arithmetic.
inline Simd<float>::Vec exp2(Simd<float>::Vec t) {
  using V = Simd<float>::Vec;
  const V f = (V)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  V p = f * 0.001877576766f + 0.008989339877f;
  p = p * f + 0.05582631823f;
  p = p * f + 0.240153617f;
  p = p * f + 0.6931530732f;
  p = p * f + 0.9999999251f;
  return (V)_mm512_scalef_ps((__m512)p, (__m512)t);
}

inline Simd<double>::Vec exp2(Simd<double>::Vec t) {
  using V = Simd<double>::Vec;
  const V f = (V)_mm512_reduce_pd((__m512d)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  V p = f * 6.27243695713783512e-10 + 6.5544557738570504e-9;
  p = p * f + 1.02544577142324723e-7;
  p = p * f + 1.320819344985004e-6;
  p = p * f + 1.52531902525511925e-5;
  p = p * f + 1.54035114462742881e-4;
  p = p * f + 1.33335586615834706e-3;
  p = p * f + 9.61812909879244896e-3;
  p = p * f + 5.55041086657111632e-2;
  p = p * f + 0.240226506959054712;
  p = p * f + 0.693147180559946235;
  p = p * f + 0.999999999999999997;
  return (V)_mm512_scalef_pd((__m512d)p, (__m512d)t);
}
#else
// Adding 1.5 * 2^(mantissa bits) rounds t to an integer n in the low bits; those bits, moved to the
// exponent, are 2^n. t is clamped to where 2^n is zero or infinity; the clamp keeps NaN.
inline Simd<float>::Vec exp2(Simd<float>::Vec t) {
  using V = Simd<float>::Vec;
  using I = Simd<float>::IntVec;
  const float round = 12582912.0f;
  t = t < -127.0f ? Simd<float>::set(-127.0f) : t;
  t = t > 128.0f ? Simd<float>::set(128.0f) : t;
  const V z = t + round;
  const V f = t - (z - round);
  V p = f * 0.001327647263f + 0.009675541343f;
  p = p * f + 0.05550713272f;
  p = p * f + 0.2402211972f;
  p = p * f + 0.6931469671f;
  p = p * f + 1.000000072f;
  I n;
  std::memcpy(&n, &z, sizeof n);
  n = (n - 0x4b400000 + 127) << 23;
  V scale;
  std::memcpy(&scale, &n, sizeof scale);
  return p * scale;
}

inline Simd<double>::Vec exp2(Simd<double>::Vec t) {
  using V = Simd<double>::Vec;
  using I = Simd<double>::IntVec;
  const double round = 6755399441055744.0;
  t = t < -1023.0 ? Simd<double>::set(-1023.0) : t;
  t = t > 1024.0 ? Simd<double>::set(1024.0) : t;
  const V z = t + round;
  const V f = t - (z - round);
  V p = f * 4.43528270695727715e-10 + 7.0741056135081428e-9;
  p = p * f + 1.01781980216719308e-7;
  p = p * f + 1.32154330896763992e-6;
  p = p * f + 1.52527334899885256e-5;
  p = p * f + 1.54035304625144321e-4;
  p = p * f + 1.33335581467899217e-3;
  p = p * f + 9.61812910758833524e-3;
  p = p * f + 5.55041086648199216e-2;
  p = p * f + 0.240226506959101562;
  p = p * f + 0.69314718055994533;
  p = p * f + 0.999999999999999997;
  I n;
  std::memcpy(&n, &z, sizeof n);
  n = (n - 0x4338000000000000LL + 1023) << 52;
  V scale;
  std::memcpy(&scale, &n, sizeof scale);
  return p * scale;
}
#endif

// Flush denormals to zero while a kernel runs (they cost a hundred cycles each and only ever carry
// weights below 2^-126 of the largest), and restore the caller's mode afterwards.
class FlushDenormals {
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
