// The inner loops of streaming attention for one instruction set: matrix products of tiles (tile_gemm.h) and, between
// them, exponentials. cross_attention_block.h says what a tile and a block are.
#include "cross_attention_tile.h"
#include "elements.h"

namespace perceiver_fast {
namespace PF_ISA {

// A tile's logits (log2 units) of all queries of a block.
template <class T>
PF_INLINE void tile_logits(const TokenTile<T>& tile, const T* q, T* logits) {
  tile_gemm<T, false>(tile.count, kQueries<T>, tile.dim, tile.k, tile.k_row, 1, q, kQueries<T>, logits, kQueries<T>);
  clear_masked(tile, logits);
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
    tile_maximum<Biased>(tile, block.scratch, largest);
    fit_shift(tile.dim_v, block, largest);
  }
  for (int64_t v = 0; v < Q; v += S::lanes) {
    const V shift = S::load(block.shift + v);
    V total{};
    for (int64_t m = 0; m < tile.count; ++m) {
      T* at = block.scratch + m * Q + v;
      V p = weight_of<Biased>(tile, m, S::load(at), shift);
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
      const V p = weight_of<Biased>(tile, m, S::load(p_at), shift);
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
      S::store(at, -weight_of<Biased>(tile, m, S::load(at), shift) * delta);
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
      const V p = weight_of<true>(tile, m, S::load(block.p + at), shift);
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
void scale(int64_t count, T factor, const T* from, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = factor * from[i];
}

// The same numbers in another dtype.
template <class From, class To>
void convert(int64_t count, const From* from, To* to) {
  for_vectors<float, kChains>(count, [&](int64_t i, int, auto at) PF_INLINE_LAMBDA { at.store(to + i, at.load(from + i)); });
}

template <class T>
const CrossAttentionKernels<T>& cross_attention_table() {
  static constexpr CrossAttentionKernels<T> table{
      Simd<T>::lanes,           int(kQueries<T>),         transpose<T>, dot<T>,         scale<T>,
      convert<BFloat16, float>, convert<float, BFloat16>, nullptr,      forward_any<T>, backward_any<T>,
      correct_any<T>,           token_sums<T>,            token_delta_any<T>};
  return table;
}
template const CrossAttentionKernels<float>& cross_attention_table<float>();
template const CrossAttentionKernels<double>& cross_attention_table<double>();

}  // namespace PF_ISA
}  // namespace perceiver_fast
