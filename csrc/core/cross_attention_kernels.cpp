// The inner loops of streaming attention for one instruction set: matrix products of tiles (tile_gemm.h) and, between
// them, exponentials. cross_attention_block.h says what a tile and a block are.
#include "cross_attention_block.h"
#include "dropout_mask.h"
#include "tile_gemm.h"

namespace perceiver_fast {
namespace PF_ISA {

template <class T>
constexpr int kQueryVectors = 2;
template <class T>
constexpr int64_t kQueries = kQueryVectors<T> * Simd<T>::lanes;

// Weights stay between 2^-kRange and 2^kRange times their number, so that sums neither overflow nor vanish.
template <class T>
constexpr T kRange = sizeof(T) == 8 ? 200 : 20;

// Zeros in the rows of masked tokens, or of all: a weight of zero does not hide what is not finite.
template <class T>
PF_INLINE void clear_masked(const TokenTile<T>& tile, T* rows) {
  using S = Simd<T>;
  if (tile.shift == nullptr && !tile.uniform) return;
  for (int64_t m = 0; m < tile.count; ++m) {
    if (!tile.uniform && tile.shift[m] != -__builtin_inff()) continue;
    for (int64_t v = 0; v < kQueries<T>; v += S::lanes) S::store(rows + m * kQueries<T> + v, typename S::Vec{});
  }
}

// A tile's logits (log2 units) of all queries of a block.
template <class T>
PF_INLINE void tile_logits(const TokenTile<T>& tile, const T* q, T* logits) {
  tile_gemm<T, false>(tile.count, kQueries<T>, tile.dim, tile.k, tile.k_row, 1, q, kQueries<T>, logits, kQueries<T>);
  clear_masked(tile, logits);
}

// 2^(logit + shift + the token's shift), times the token's weight.
template <class T, bool Biased>
PF_INLINE typename Simd<T>::Vec weight_of(const TokenTile<T>& tile, int64_t m, const T* logit,
                                          typename Simd<T>::Vec shift) {
  using S = Simd<T>;
  if (!Biased) return exp2<T, true>(S::load(logit), shift);
  return exp2<T, true>(S::load(logit), shift + tile.shift[m]) * tile.weight[m];
}

// Changes the shifts of a block where the weights of a tile with these largest logits would leave the range, and scales
// the sums so far to match. That is seldom: on a first tile of large logits, and where a later tile has far larger
// ones.
template <class T>
void fit_shift(int64_t dim_v, const ForwardBlock<T>& block, const T* largest) {
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
template <class T, bool Biased>
PF_INLINE void tile_maximum(const TokenTile<T>& tile, const T* logits, T* largest) {
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

template <class T, bool Biased, bool Dropped>
void forward(const TokenTile<T>& tile, const ForwardBlock<T>& block, bool fixed_shift) {
  using S = Simd<T>;
  using V = typename S::Vec;
  const FlushDenormals flush;
  const int64_t Q = kQueries<T>;
  tile_logits(tile, block.q, block.scratch);
  if (!fixed_shift) {
    alignas(64) T largest[kQueries<T>];
    tile_maximum<T, Biased>(tile, block.scratch, largest);
    fit_shift(tile.dim_v, block, largest);
  }
  for (int64_t v = 0; v < Q; v += S::lanes) {
    const V shift = S::load(block.shift + v);
    V total{};
    for (int64_t m = 0; m < tile.count; ++m) {
      T* at = block.scratch + m * Q + v;
      V p = weight_of<T, Biased>(tile, m, at, shift);
      total += p;
      if (Dropped) p = keep<T>(p, block.hashes + v, tile.hashes[m], tile.threshold);
      S::store(at, p);
    }
    S::store(block.total + v, S::load(block.total + v) + total);
  }
  tile_gemm<T, true>(tile.dim_v, Q, tile.count, tile.v, 1, tile.v_row, block.scratch, Q, block.out, Q);
}

// Weights p and u = v grad of a tile, in scratch.
template <class T>
PF_INLINE void tile_products(const TokenTile<T>& tile, const BackwardBlock<T>& block) {
  tile_logits(tile, block.q, block.p);
  tile_gemm<T, false>(tile.count, kQueries<T>, tile.dim_v, tile.v, tile.v_row, 1, block.grad, kQueries<T>, block.ds,
                      kQueries<T>);
  if (!tile.uniform) clear_masked(tile, block.ds);
}

template <class T, bool Biased, bool Dropped>
void backward(const TokenTile<T>& tile, const BackwardBlock<T>& block) {
  using S = Simd<T>;
  using V = typename S::Vec;
  const FlushDenormals flush;
  const int64_t Q = kQueries<T>;
  tile_products(tile, block);
  for (int64_t v = 0; v < Q; v += S::lanes) {
    const V shift = S::load(block.shift + v), delta = S::load(block.delta + v);
    const V delta_low = S::load(block.delta_low + v);
    V sum{}, size{};
    for (int64_t m = 0; m < tile.count; ++m) {
      T *p_at = block.p + m * Q + v, *u_at = block.ds + m * Q + v;
      const V p = weight_of<T, Biased>(tile, m, p_at, shift);
      V u = S::load(u_at), kept = p;
      if (Dropped) {
        kept = keep<T>(p, block.hashes + v, tile.hashes[m], tile.threshold);
        u = keep<T>(u, block.hashes + v, tile.hashes[m], tile.threshold);
      }
      V ds = p * (Biased ? u - delta - delta_low - tile.delta[m] - tile.delta_low[m] : u - delta);
      sum += ds;
      size += S::max(ds, -ds);
      S::store(p_at, kept);
      S::store(u_at, ds);
    }
    if (tile.uniform) continue;
    S::store(block.sum + v, S::load(block.sum + v) + sum);
    S::store(block.size + v, S::load(block.size + v) + size);
  }
  if (!tile.uniform) {  // else weights depend on neither q nor k
    clear_masked(tile, block.ds);
    tile_gemm<T, true>(tile.dim, Q, tile.count, tile.k, 1, tile.k_row, block.ds, Q, block.dq, Q);
    if (block.dk)
      tile_gemm<T, true>(tile.count, block.pad_d, Q, block.ds, Q, 1, block.q_rows, block.pad_d, block.dk, block.dk_row);
  }
  if (!block.dv) return;
  tile_gemm<T, true>(tile.count, block.pad_v, Q, block.p, Q, 1, block.grad_rows, block.pad_v, block.dv, block.dv_row);
}

template <class T, bool Biased>
void correct(const TokenTile<T>& tile, const BackwardBlock<T>& block, const T* change) {
  using S = Simd<T>;
  const FlushDenormals flush;
  const int64_t Q = kQueries<T>;
  tile_logits(tile, block.q, block.p);
  for (int64_t v = 0; v < Q; v += S::lanes) {
    const auto shift = S::load(block.shift + v), delta = S::load(change + v);
    for (int64_t m = 0; m < tile.count; ++m) {
      T* at = block.p + m * Q + v;
      S::store(at, -weight_of<T, Biased>(tile, m, at, shift) * delta);
    }
  }
  clear_masked(tile, block.p);
  tile_gemm<T, true>(tile.dim, Q, tile.count, tile.k, 1, tile.k_row, block.p, Q, block.dq, Q);
  if (!block.dk) return;
  tile_gemm<T, true>(tile.count, block.pad_d, Q, block.p, Q, 1, block.q_rows, block.pad_d, block.dk, block.dk_row);
}

template <class T>
void token_sums(const TokenTile<T>& tile, const T* q, const T* bias, T* maximum, T* sum, T* scratch) {
  using S = Simd<T>;
  using V = typename S::Vec;
  const FlushDenormals flush;
  tile_logits(tile, q, scratch);
  for (int64_t v = 0; v < kQueries<T>; v += S::lanes) {
    const V lane_bias = S::load(bias + v);
    for (int64_t m = 0; m < tile.count; ++m) {
      const int64_t at = m * kQueries<T> + v;
      const V t = S::load(scratch + at) + lane_bias, old = S::load(maximum + at), top = S::max(t, old);
      const V before = S::load(sum + at), rescaled = before * exp2<T, false>(old - top, V{});
      // The computed 2^0 is one only up to rounding, which would add up.
      S::store(sum + at, (old == top ? before : rescaled) + exp2<T, false>(t - top, V{}));
      S::store(maximum + at, top);
    }
  }
}

template <class T, bool Dropped>
void token_delta(const TokenTile<T>& tile, const BackwardBlock<T>& block, T* sums) {
  using S = Simd<T>;
  using V = typename S::Vec;
  const FlushDenormals flush;
  const int64_t Q = kQueries<T>;
  tile_products(tile, block);
  for (int64_t v = 0; v < Q; v += S::lanes) {
    const V shift = S::load(block.shift + v), delta = S::load(block.delta + v);
    const V delta_low = S::load(block.delta_low + v);
    for (int64_t m = 0; m < tile.count; ++m) {
      const int64_t at = m * Q + v;
      V u = S::load(block.ds + at);
      if (Dropped) u = keep<T>(u, block.hashes + v, tile.hashes[m], tile.threshold);
      const V p = weight_of<T, true>(tile, m, block.p + at, shift);
      S::store(sums + at, S::load(sums + at) + p * (u - delta - delta_low - tile.delta[m]));
    }
  }
}

// With dropout the tokens' shifts are added even where all are zero: one variant less to compile, and dropout is rare.
template <class T>
void forward_any(const TokenTile<T>& tile, const ForwardBlock<T>& block, bool fixed_shift) {
  if (tile.threshold != 0) return forward<T, true, true>(tile, block, fixed_shift);
  if (tile.shift != nullptr) return forward<T, true, false>(tile, block, fixed_shift);
  return forward<T, false, false>(tile, block, fixed_shift);
}

template <class T>
void backward_any(const TokenTile<T>& tile, const BackwardBlock<T>& block) {
  if (tile.threshold != 0) return backward<T, true, true>(tile, block);
  if (tile.shift != nullptr) return backward<T, true, false>(tile, block);
  return backward<T, false, false>(tile, block);
}

template <class T>
void correct_any(const TokenTile<T>& tile, const BackwardBlock<T>& block, const T* change) {
  return tile.shift != nullptr ? correct<T, true>(tile, block, change) : correct<T, false>(tile, block, change);
}

template <class T>
void token_delta_any(const TokenTile<T>& tile, const BackwardBlock<T>& block, T* sums) {
  return tile.threshold != 0 ? token_delta<T, true>(tile, block, sums) : token_delta<T, false>(tile, block, sums);
}

template <class T>
const CrossAttentionKernels<T>& cross_attention_table() {
  static constexpr CrossAttentionKernels<T> table{
      Simd<T>::lanes, int(kQueries<T>), forward_any<T>, backward_any<T>, correct_any<T>, token_sums<T>,
      token_delta_any<T>};
  return table;
}
template const CrossAttentionKernels<float>& cross_attention_table<float>();
template const CrossAttentionKernels<double>& cross_attention_table<double>();

}  // namespace PF_ISA
}  // namespace perceiver_fast
