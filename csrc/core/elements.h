// Arrays of any dtype as vectors of the type that arithmetic is done in, for one instruction set: loads, stores and
// conversions, loops over arrays whose length is no multiple of a vector's, and sums.
#pragma once

#include "dtypes.h"
#include "simd.h"

#define PF_INLINE_LAMBDA __attribute__((always_inline))

namespace perceiver_fast {
namespace PF_ISA {

// load, store, and rounded(v): what a load would give back after v was stored.
template <class X>
struct Elements : Simd<X> {
  using T = X;
  using Vec = typename Simd<X>::Vec;
  static PF_INLINE Vec rounded(Vec v) { return v; }
};

// Lanes of 32 bits from 16-bit elements in memory, and back. Written out, since compilers take more instructions for
// it.
typedef uint32_t Words32 __attribute__((vector_size(PF_VECTOR_BYTES)));
#if PF_VECTOR_BYTES == 64
PF_INLINE Words32 load_halves(const void* p) {
  return (Words32)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
PF_INLINE void store_halves(void* p, Words32 words) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)words));
}
#elif PF_VECTOR_BYTES == 32
PF_INLINE Words32 load_halves(const void* p) {
  return (Words32)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
PF_INLINE void store_halves(void* p, Words32 words) {
  const __m128i low = _mm256_castsi256_si128((__m256i)words), high = _mm256_extracti128_si256((__m256i)words, 1);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}
#else
typedef uint16_t Words16 __attribute__((vector_size(PF_VECTOR_BYTES / 2)));
PF_INLINE Words32 load_halves(const void* p) {
  Words16 halves;
  std::memcpy(&halves, p, sizeof halves);
  return __builtin_convertvector(halves, Words32);
}
PF_INLINE void store_halves(void* p, Words32 words) {
  const Words16 halves = __builtin_convertvector(words, Words16);
  std::memcpy(p, &halves, sizeof halves);
}
#endif

// bfloat16 is the upper half of a float; rounding is to nearest, ties to even, and NaN stays NaN.
template <>
struct Elements<BFloat16> {
  using T = float;
  using Vec = Simd<float>::Vec;
  static PF_INLINE Words32 round(Vec v) {
    const Words32 bits = (Words32)v;
    return v != v ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  static PF_INLINE Vec rounded(Vec v) { return (Vec)(round(v) & 0xffff0000u); }
  static PF_INLINE Vec load(const BFloat16* p) { return (Vec)(load_halves(p) << 16); }
  static PF_INLINE void store(BFloat16* p, Vec v) { store_halves(p, round(v) >> 16); }
};

// Access to a whole vector of an array, or to the `count` elements that its end leaves; the other lanes are zero.
template <class T>
struct Whole {
  using Vec = typename Simd<T>::Vec;
  template <class X>
  PF_INLINE Vec load(const X* p) const { return Elements<X>::load(p); }
  template <class X>
  PF_INLINE void store(X* p, Vec v) const { Elements<X>::store(p, v); }
  PF_INLINE Vec inside(Vec v) const { return v; }  // lanes of elements that there are; the others become zero
};
template <class T>
struct Ragged {
  using Vec = typename Simd<T>::Vec;
  int64_t count;
  template <class X>
  PF_INLINE Vec load(const X* p) const {
    X buffer[Simd<T>::lanes] = {};
    std::memcpy(buffer, p, sizeof(X) * count);
    return Elements<X>::load(buffer);
  }
  template <class X>
  PF_INLINE void store(X* p, Vec v) const {
    X buffer[Simd<T>::lanes];
    Elements<X>::store(buffer, v);
    std::memcpy(p, buffer, sizeof(X) * count);
  }
  PF_INLINE Vec inside(Vec v) const {
    T buffer[Simd<T>::lanes];
    Simd<T>::store(buffer, v);
    return load(buffer);
  }
};

// Calls body(i, chain, at) for the vectors of [0, n): a vector starts at i, `at` loads and stores it, and one vector's
// chain is not the next one's, so that sums by chain need not wait for one another.
template <class T, int Chains, class Body>
PF_INLINE void for_vectors(int64_t n, Body body) {
  constexpr int64_t lanes = Simd<T>::lanes;
  int64_t i = 0;
  for (; i + Chains * lanes <= n; i += Chains * lanes)
    for (int chain = 0; chain < Chains; ++chain) body(i + chain * lanes, chain, Whole<T>());
  for (; Chains > 1 && i + lanes <= n; i += lanes) body(i, 0, Whole<T>());
  if (i < n) body(i, 0, Ragged<T>{n - i});
}

constexpr int kChains = 4;

PF_INLINE float sum_lanes(Simd<float>::Vec v) {
#if PF_VECTOR_BYTES == 64
  return _mm512_reduce_add_ps((__m512)v);
#else
#if PF_VECTOR_BYTES == 32
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  const auto half = v;
#endif
  return (half[0] + half[2]) + (half[1] + half[3]);
#endif
}
PF_INLINE double sum_lanes(Simd<double>::Vec v) {
#if PF_VECTOR_BYTES == 64
  return _mm512_reduce_add_pd((__m512d)v);
#elif PF_VECTOR_BYTES == 32
  return (v[0] + v[2]) + (v[1] + v[3]);
#else
  return v[0] + v[1];
#endif
}

// A sum by for_vectors' chains.
template <class T>
struct Sum {
  typename Simd<T>::Vec chain[kChains] = {};
  PF_INLINE T total() const { return sum_lanes((chain[0] + chain[1]) + (chain[2] + chain[3])); }
};

}  // namespace PF_ISA
}  // namespace perceiver_fast
