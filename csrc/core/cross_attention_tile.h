// What the inner loops of streaming attention share, whatever their products multiply (cross_attention_kernels.cpp and
// cross_attention_bfloat16_kernels.cpp). cross_attention_block.h says what a tile and a block are.
#pragma once

#include "cross_attention_block.h"
#include "dropout_mask.h"
#include "tile_gemm.h"
#include "transpose.h"

namespace perceiver_fast {
namespace PF_ISA {

template <class T>
constexpr int kQueryVectors = 2;
template <class T>
constexpr int64_t kQueries = kQueryVectors<T> * Simd<T>::lanes;

// Sixteen sums need not wait for one another.
template <class X>
double dot(int64_t count, const X* a, const ComputeOf<X>* b) {
  constexpr int chains = 16;
  double sums[chains] = {};
  int64_t i = 0;
  for (; i + chains <= count; i += chains)
    for (int chain = 0; chain < chains; ++chain) sums[chain] += double(widened(a[i + chain])) * double(b[i + chain]);
  for (; i < count; ++i) sums[0] += double(widened(a[i])) * double(b[i]);
  for (int step = chains / 2; step > 0; step /= 2)
    for (int chain = 0; chain < step; ++chain) sums[chain] += sums[chain + step];
  return sums[0];
}

// Weights stay between 2^-kRange and 2^kRange times their number, so that sums neither overflow nor vanish.
template <class T>
constexpr T kRange = sizeof(T) == 8 ? 200 : 20;

// Zeros in the rows of masked tokens, or of all: a weight of zero does not hide what is not finite.
template <class X, class T = ComputeOf<X>>
PF_INLINE void clear_masked(const TokenTile<X>& tile, T* rows) {
  using S = Simd<T>;
  if (tile.shift == nullptr && !tile.uniform) return;
  for (int64_t m = 0; m < tile.count; ++m) {
    if (!tile.uniform && tile.shift[m] != -__builtin_inff()) continue;
    for (int64_t v = 0; v < kQueries<T>; v += S::lanes) S::store(rows + m * kQueries<T> + v, typename S::Vec{});
  }
}

// 2^(logit + shift + the token's shift), times the token's weight.
template <bool Biased, class X>
PF_INLINE typename Simd<ComputeOf<X>>::Vec weight_of(const TokenTile<X>& tile, int64_t m,
                                                     typename Simd<ComputeOf<X>>::Vec logit,
                                                     typename Simd<ComputeOf<X>>::Vec shift) {
  using T = ComputeOf<X>;
  if (!Biased) return exp2<T, true>(logit, shift);
  return exp2<T, true>(logit, shift + tile.shift[m]) * tile.weight[m];
}

// Changes the shifts of a block where the weights of a tile with these largest logits would leave the range, and scales
// the sums so far to match. That is seldom: on a first tile of large logits, and where a later tile has far larger
// ones.
template <class X, class T = ComputeOf<X>>
void fit_shift(int64_t dim_v, const ForwardBlock<X>& block, const T* largest) {
  using S = Simd<T>;
  const int64_t Q = kQueries<T>;
  alignas(64) T factor[kQueries<T>];
  bool any = false;
  for (int64_t lane = 0; lane < Q; ++lane) {
    const T old = block.shift[lane], top = largest[lane] + old;
    const bool move = top > kRange<T> || (block.total[lane] == 0 && top < -kRange<T> && top - top == 0);
    if (move) block.shift[lane] = T(-__builtin_nearbyint(double(largest[lane])));
    factor[lane] = block.total[lane] == 0 ? T(0) : block.shift[lane] - old;  // nothing summed, nothing to scale
    any |= move;
  }
  if (!any) return;
  for (int64_t v = 0; v < Q; v += S::lanes) {
    const auto scale = exp2<T, true>(typename S::Vec{}, S::load(factor + v));
    S::store(block.total + v, S::load(block.total + v) * scale);
    for (int64_t c = 0; c < dim_v; ++c) {
      T* at = block.out + c * Q + v;
      S::store(at, S::load(at) * scale);
    }
  }
}

// Largest logit of every query of a tile, tokens' shifts included; -inf when all are masked.
template <bool Biased, class X, class T = ComputeOf<X>>
PF_INLINE void tile_maximum(const TokenTile<X>& tile, const T* logits, T* largest) {
  using S = Simd<T>;
  for (int64_t v = 0; v < kQueries<T>; v += S::lanes) {
    auto top = S::set(-__builtin_inff());
    for (int64_t m = 0; m < tile.count; ++m) {
      auto t = S::load(logits + m * kQueries<T> + v);
      if (Biased) t += tile.shift[m];
      top = S::max(t, top);
    }
    S::store(largest + v, top);
  }
}

}  // namespace PF_ISA
}  // namespace perceiver_fast
