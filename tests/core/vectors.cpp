// Loads, stores, conversions, sums across lanes, and dropout's hashes, for one instruction set.
#include "../../csrc/core/dropout_mask.h"
#include "../../csrc/core/elements.h"
#include "check.h"

namespace perceiver_fast {
namespace PF_ISA {
namespace {

template <class X>
X element_of(double x) {
  return X(x);
}
template <>
BFloat16 element_of<BFloat16>(double x) {  // of a number that bfloat16 has
  const float value = float(x);
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return {uint16_t(bits >> 16)};
}

// for_vectors reaches every element once, for every remainder and alignment, and nothing beside them.
template <class X, int Chains>
void copy_arrays() {
  using T = typename Elements<X>::T;
  constexpr int64_t lanes = Simd<T>::lanes;
  for (int64_t n = 0; n <= 2 * Chains * lanes + 1; ++n)
    for (int64_t gap = 0; gap < 64; gap += 24) {
      const Guarded<X> from(n, gap), to(n, gap);
      for (int64_t i = 0; i < n; ++i) from[i] = element_of<X>(i % 100 - 50);
      T expected = 0, total = 0;
      int64_t beyond = 0;
      Sum<T> sum;
      for_vectors<T, Chains>(n, [&](int64_t i, int chain, auto at) {
        const auto v = at.load(from.data() + i);
        at.store(to.data() + i, v);
        sum.chain[chain] += v;
        const auto inside = at.inside(Simd<T>::set(T(1)));
        for (int64_t lane = 0; lane < lanes; ++lane) beyond += (inside[lane] == 1) != (i + lane < n);
      });
      for (int64_t i = 0; i < n; ++i) {
        CHECK(value_of(to[i]) == value_of(from[i]), "element %d of %d, gap %d", int(i), int(n), int(gap));
        expected += T(value_of(from[i]));
      }
      total = sum.total();
      CHECK(total == expected, "sum of %d: %g, not %g", int(n), double(total), double(expected));
      CHECK(beyond == 0, "lanes beyond %d elements", int(n));
    }
}

void copies() {
  copy_arrays<double, 1>();
  copy_arrays<double, 4>();
  copy_arrays<float, 1>();
  copy_arrays<float, 4>();
  copy_arrays<BFloat16, 1>();
  copy_arrays<BFloat16, 4>();
}

// The bfloat16 that a float rounds to: the nearer neighbour, of two as near the even one.
uint16_t rounded_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint16_t low = uint16_t(bits >> 16), high = uint16_t(low + 1);
  if (x - x != 0) return low;  // infinities
  const double below = fabs(double(x) - value_of(BFloat16{low}));
  double above = value_of(BFloat16{high});
  if (above - above != 0) above = copysign(0x1p128, x);  // beyond the largest number
  above = fabs(double(x) - above);
  return below < above || (below == above && low % 2 == 0) ? low : high;
}

// Every bfloat16, and floats on both sides of the middle between two of them.
void bfloat16() {
  using F = Simd<float>;
  const uint32_t offsets[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
  for (uint32_t upper = 0; upper < 0x10000; ++upper)
    for (uint32_t offset : offsets) {
      const uint32_t bits = upper << 16 | offset;
      float x, back[F::lanes], rounded[F::lanes];
      memcpy(&x, &bits, sizeof x);
      BFloat16 stored[F::lanes];
      typename F::Vec v = {};  // x beside zeros: no set(), whose subtraction is an operation on x
      v[F::lanes - 1] = x;
      Elements<BFloat16>::store(stored, v);
      F::store(back, Elements<BFloat16>::load(stored));
      F::store(rounded, Elements<BFloat16>::rounded(v));
      const BFloat16 last = stored[F::lanes - 1];
      const float loaded = back[F::lanes - 1];
      if (x != x) {
        CHECK(loaded != loaded, "NaN %08x became %04x", bits, last.bits);
        continue;
      }
      CHECK(last.bits == rounded_bits(x), "%08x became %04x, not %04x", bits, last.bits, rounded_bits(x));
      CHECK(loaded == value_of(last) && rounded[F::lanes - 1] == loaded, "%08x read back", bits);
    }
}

// A weight stays where the hash of both hashes reaches the threshold: 32-bit integers, alike on every instruction set.
template <class T>
void keep_weights() {
  constexpr int lanes = Simd<T>::lanes;
  const uint32_t thresholds[] = {1, 0x4ccccccc, 0x80000000, 0xffffffff};
  uint32_t next = 1;
  for (int draw = 0; draw < 1000; ++draw)
    for (uint32_t threshold : thresholds) {
      const Guarded<typename HashLane<T>::type> hashes(lanes);
      for (int lane = 0; lane < lanes; ++lane) hashes[lane] = next = lowbias32(next + 1);
      const uint32_t hash = next = lowbias32(next + 1);
      const auto p = keep<T>(Simd<T>::set(T(0.5)), hashes.data(), hash, threshold);
      for (int lane = 0; lane < lanes; ++lane) {
        const bool stays = lowbias32(uint32_t(hashes[lane]) ^ hash) >= threshold;
        CHECK(p[lane] == (stays ? T(0.5) : T(0)), "lane %d, threshold %08x", lane, threshold);
      }
    }
}

void dropout() {
  keep_weights<float>();
  keep_weights<double>();
}

}  // namespace

extern const Case vectors_cases[] = {
    {"copies", copies}, {"bfloat16", bfloat16}, {"dropout", dropout}, {nullptr, nullptr}};

}  // namespace PF_ISA
}  // namespace perceiver_fast
