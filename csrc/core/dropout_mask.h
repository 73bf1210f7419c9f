// The weights that dropout.h keeps, a vector at a time, for one instruction set: the hashes of a vector of queries meet
// the hash of one token, or the other way round.
#pragma once

#include "dropout.h"
#include "simd.h"

namespace perceiver_fast {
namespace PF_ISA {

// Hashes stand in lanes as wide as T; all arithmetic is of 32 bits.
template <class T>
struct DropoutLanes;
template <>
struct DropoutLanes<float> {
  typedef uint32_t Vec __attribute__((vector_size(PF_VECTOR_BYTES)));
  static PF_INLINE Vec low32(Vec x) { return x; }
};
template <>
struct DropoutLanes<double> {
  typedef uint64_t Vec __attribute__((vector_size(PF_VECTOR_BYTES)));
  static PF_INLINE Vec low32(Vec x) { return x & 0xffffffffu; }
};

// p where the weight is kept, zero where it is dropped. The mixer is Chris Wellons' lowbias32.
template <class T>
PF_INLINE typename Simd<T>::Vec keep(typename Simd<T>::Vec p, const typename HashLane<T>::type* hashes, uint32_t hash,
                                     uint32_t threshold) {
  using D = DropoutLanes<T>;
  typename D::Vec x;
  std::memcpy(&x, hashes, sizeof x);
  x ^= typename HashLane<T>::type(hash);
  x ^= x >> 16;
  x = D::low32(x * 0x7feb352du);
  x ^= x >> 15;
  x = D::low32(x * 0x846ca68bu);
  x ^= x >> 16;
  return x >= typename HashLane<T>::type(threshold) ? p : typename Simd<T>::Vec{};
}

}  // namespace PF_ISA
}  // namespace perceiver_fast
