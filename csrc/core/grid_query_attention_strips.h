// What the forward's and the backward's loops share, for one instruction set: packing of queries, and logits.
#pragma once

#include "dropout_mask.h"
#include "grid_query_attention_block.h"
#include "tile_gemm.h"
#include "transpose.h"

namespace perceiver_fast {
namespace PF_ISA {

constexpr int kStripVectors = kGemmVectors;
template <class T>
constexpr int64_t kStrip = kStripVectors * Simd<T>::lanes;
// Keys of a block: their sums in tile_gemm are one sum, and no row of its blocks is left over.
constexpr int64_t kBlockKeys = kGemmDepth / kGemmRows * kGemmRows;
constexpr int64_t kPanel = 4 * kGemmRows;  // channels of values that stand together
constexpr int64_t kFew = 4;                // channels of values that are summed up in registers

// Exponents up to here need no shift: terms that matter beside the largest do not underflow, and sums of 2^14 of them
// times values up to 2^70 do not overflow.
template <class T>
constexpr T kSafeExponent = sizeof(T) == 8 ? 400 : 40;

constexpr double kLn2 = 0.69314718055994531, kLog2E = 1.4426950408889634;

// What a strip's logits are made of.
enum class Source { axes, channels, both };

// Where a strip stands.
struct StripPlace {
  int64_t row, strip, first, count;  // its first query, and how many
};

template <class T>
PF_INLINE StripPlace place_of(const QueryRows<T>& rows, int64_t index) {
  const int64_t row = index / rows.strips, strip = index % rows.strips, column = strip * kStrip<T>;
  const int64_t left = rows.columns - column;
  return {row, strip, row * rows.columns + column, left < kStrip<T> ? left : kStrip<T>};
}

// Scales, and scaled channels, one query a lane; zero in lanes without a query.
template <class T>
void pack(const QueryRows<T>& rows, const QueryGroup<T>& group) {
  const int64_t W = kStrip<T>, F = rows.features;
  for (int64_t s = 0; s < group.count; ++s) {
    const StripPlace at = place_of(rows, group.first + s);
    T *r = group.r + s * W, *x = group.x + s * F * W;
    const bool blank = rows.blank;
    for (int64_t lane = 0; lane < W; ++lane)
      r[lane] = blank || lane >= at.count ? T(0) : rows.scale == nullptr ? T(1) : rows.scale[at.first + lane];
    if (F == 0) continue;
    if (blank || at.count < W)
      for (int64_t i = 0; i < F * W; ++i) x[i] = 0;
    if (blank) continue;
    transpose(at.count, F, rows.feat + at.first * F, F, x, W);
    if (rows.scale == nullptr) continue;
    for (int64_t f = 0; f < F; ++f)
      for (int64_t v = 0; v < W; v += Simd<T>::lanes)
        Simd<T>::store(x + f * W + v, Simd<T>::load(x + f * W + v) * Simd<T>::load(r + v));
  }
}

// sums[n] of the tables of a row's outer axes, for `count` keys from `begin` on; returns where they are.
template <class T>
const T* row_sums(const QueryRows<T>& rows, const QueryKeys<T>& keys, int64_t row, int64_t begin, int64_t count,
                  T* sums) {
  if (rows.outer_axes == 1) return keys.outer + row * keys.count + begin;
  for (int64_t n = 0; n < count; ++n) sums[n] = 0;
  int64_t first = rows.outer_total;
  for (int64_t a = rows.outer_axes; a-- > 0; row /= rows.outer_sizes[a]) {
    first -= rows.outer_sizes[a];
    const T* table = keys.outer + (first + row % rows.outer_sizes[a]) * keys.count + begin;
    for (int64_t n = 0; n < count; ++n) sums[n] += table[n];
  }
  return sums;
}

// Some keys and a strip. `tile` [count][kStrip] has the channels' part of the logits, if there is one.
template <class T>
struct StripKeys {
  int64_t count;
  const T *columns, *sums, *bias, *bias_log2, *r;
  T* tile;
};

// The logit's part by axes, before its scale.
template <class T>
PF_INLINE typename Simd<T>::Vec axes_part(const StripKeys<T>& k, int64_t n, int64_t v) {
  return Simd<T>::load(k.columns + n * kStrip<T> + v) + k.sums[n];
}

template <class T, Source From>
PF_INLINE typename Simd<T>::Vec logit(const StripKeys<T>& k, int64_t n, int64_t v, typename Simd<T>::Vec r) {
  using S = Simd<T>;
  if (From == Source::axes) return fma(r, axes_part(k, n, v), S::set(k.bias[n]));
  const auto channels = S::load(k.tile + n * kStrip<T> + v) + k.bias[n];
  return From == Source::channels ? channels : fma(r, axes_part(k, n, v), channels);
}

// e^(logit + shift), where the sum is at most 88 and may be far below zero.
template <class T, Source From>
PF_INLINE typename Simd<T>::Vec weight(const StripKeys<T>& k, int64_t n, int64_t v, typename Simd<T>::Vec r,
                                       typename Simd<T>::Vec shift) {
  using S = Simd<T>;
  const auto t = (logit<T, From>(k, n, v, r) + shift) * T(kLog2E);
  return exp2_within<T>(S::max(S::set(kLeastExponent<T>), t));  // NaN, the second operand, stays
}

// Calls body with the source of the logits as a type's constant.
template <Source From>
struct SourceIs {
  static constexpr Source from = From;
};
template <class Rows, class Body>
PF_INLINE void with_source(const Rows& rows, const Body& body) {
  if (!rows.grid) return body(SourceIs<Source::channels>());
  if (rows.features == 0) return body(SourceIs<Source::axes>());
  return body(SourceIs<Source::both>());
}

// The keys from `begin` on of a strip, with the channels' part of their logits in `tile`.
template <class T>
PF_INLINE StripKeys<T> strip_keys(const QueryRows<T>& rows, const QueryKeys<T>& keys, const QueryGroup<T>& group,
                                  int64_t s, int64_t begin, int64_t count, T* sums, T* tile) {
  const int64_t W = kStrip<T>, F = rows.features;
  const StripPlace at = place_of(rows, group.first + s);
  StripKeys<T> k{count, nullptr, nullptr, keys.bias + begin, keys.bias_log2 + begin, group.r + s * W, tile};
  if (rows.grid) {
    k.columns = keys.columns + (at.strip * keys.count + begin) * W;
    k.sums = row_sums(rows, keys, at.row, begin, count, sums);
  }
  if (F > 0) tile_gemm<T, false>(count, W, F, keys.feat + begin * F, F, 1, group.x + s * F * W, W, tile, W);
  if (F == 0 && !rows.grid)
    for (int64_t i = 0; i < count * W; ++i) tile[i] = 0;
  return k;
}

// Keys of a block: all of one size, but the last one.
PF_INLINE int64_t block_keys(int64_t count) {
  const int64_t blocks = (count + kBlockKeys - 1) / kBlockKeys, each = (count + blocks - 1) / blocks;
  return (each + kGemmRows - 1) / kGemmRows * kGemmRows;
}

}  // namespace PF_ISA
}  // namespace perceiver_fast
