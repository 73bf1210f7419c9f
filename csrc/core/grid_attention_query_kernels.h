// The loops of grid attention that sum over tokens, forward and backward, for one instruction set: a lane is a query.
//
// S[n,m] = r_m (sum_f q_feat[n,f] x_mf + sum_a q_axes_a[n, i_a(m)]); a token arrives as (r, r x), so a vector of pairs
// costs an add, a multiply, F fused multiply-adds, one exp2 and F + 3 accumulations: 18 vector instructions for RGB
// with AVX-512, 24 in the backward.
//
// Every float sum is short: a tile of columns, then a block of rows, then the blocks. No more than a few hundred terms
// are added one after the other, so the error does not grow with the number of tokens.
#pragma once

#include "dropout_mask.h"
#include "grid_attention_block.h"
#include "simd.h"

namespace perceiver_fast {
namespace PF_ISA {

constexpr int64_t kTileColumns = 128;  // table and sums of a tile: 16 KB of L1 at 64 bytes a vector
constexpr int64_t kBlockRows = 128;
constexpr int kUnroll = 4;  // tokens at a time, to overlap their latencies: 11 % over 2, 20 % over 1 (AVX-512, F = 3)

// Index of every outer axis, advanced row by row; rows are counted in row-major order.
struct OuterIndex {
  static constexpr int kMaxAxes = 64;
  int64_t axes;
  const int64_t* sizes;
  int64_t index[kMaxAxes];

  OuterIndex(int64_t axes_, const int64_t* sizes_, int64_t row) : axes(axes_), sizes(sizes_) {
    for (int64_t a = axes - 1; a >= 0; --a) {
      index[a] = row % sizes[a];
      row /= sizes[a];
    }
  }
  PF_INLINE void next() {
    for (int64_t a = axes - 1; a >= 0; --a) {
      if (++index[a] < sizes[a]) return;
      index[a] = 0;
    }
  }
  // Sum over the outer axes of table[offset of a + index of a].
  template <class T>
  PF_INLINE typename Simd<T>::Vec sum(const T* table) const {
    using S = Simd<T>;
    typename S::Vec total{};
    for (int64_t a = 0; a < axes; ++a) {
      total += S::load(table + index[a] * S::lanes);
      table += sizes[a] * S::lanes;
    }
    return total;
  }
  template <class T>
  PF_INLINE void add(T* table, typename Simd<T>::Vec value) const {
    using S = Simd<T>;
    for (int64_t a = 0; a < axes; ++a) {
      T* p = table + index[a] * S::lanes;
      S::store(p, S::load(p) + value);
      table += sizes[a] * S::lanes;
    }
  }
};

// What a kernel has to do beside the plain case. A mask or a shift costs an instruction or two for every pair of query
// and token, inverted attention four. `dropped` has all of these and dropout, whose hash costs ten.
enum class Variant { plain, masked, masked_and_shifted, inverted, dropped };

template <int N>
struct Count {
  static constexpr int value = N;
};

constexpr int64_t kFewFeatures = 4;    // those that there are kernels for, of a fixed number
constexpr int64_t kFeatureBlock = 32;  // channels that are added one after the other, the longest such sum

// Adds the features' part to U numbers u, many features in blocks. What is subtracted from u are sums of it over tokens or over
// queries, which leaves nothing where one weight is all: so every kernel has to round u alike, whatever its lanes are
// and whether it knows the number of features.
template <class T, int FS, int U, class Grad, class X>
PF_INLINE void add_features(int64_t features, const Grad& grad, const X& x, typename Simd<T>::Vec* u) {
  const int64_t F = FS > 0 ? FS : features;
  if (F <= kFewFeatures) {
    for (int64_t f = 0; f < F; ++f)
      for (int i = 0; i < U; ++i) u[i] = fma(grad(f), x(f, i), u[i]);
    return;
  }
  for (int64_t begin = 0; begin < F; begin += kFeatureBlock) {
    typename Simd<T>::Vec part[U] = {};
    for (int64_t f = begin; f < F && f < begin + kFeatureBlock; ++f)
      for (int i = 0; i < U; ++i) part[i] = fma(grad(f), x(f, i), part[i]);
    for (int i = 0; i < U; ++i) u[i] += part[i];
  }
}

// U consecutive tokens against one vector of queries. FS > 0 fixes the number of features at compile time
// and keeps q_feat and its sums in registers; FS = 0 reads them from memory, which U tokens share.
template <class T, int FS, int U, Variant kind, bool Backward>
struct Step {
  using S = Simd<T>;
  using V = typename S::Vec;

  // `m` is the first token; a and g_a are the outer axes' shares of its row.
  static PF_INLINE void run(const TokenBox<T>& box, int64_t m, const T* q_inner, const T* g_inner, T* out_inner,
                            const V* q_feat, const V* g_feat, V* acc, V& total, V& kept, V& row_sum, V a, V g_a,
                            V shift, V delta, V delta_low, V bonus, const typename HashLane<T>::type* hashes) {
    constexpr bool by_token = kind == Variant::inverted || kind == Variant::dropped;
    const int64_t F = FS > 0 ? FS : box.features, K = F + 2;
    const T* tok = box.tokens + m * K;
    V t[U], p[U], r[U];
    for (int u = 0; u < U; ++u) {
      r[u] = S::set(tok[u * K]);
      t[u] = (S::load(q_inner + u * S::lanes) + a) * r[u];
      if (kind != Variant::plain) t[u] += S::set(tok[u * K + 1 + F]);
    }
    for (int64_t f = 0; f < F; ++f)
      for (int u = 0; u < U; ++u) t[u] = fma(q_feat[f], S::set(tok[u * K + 1 + f]), t[u]);
    for (int u = 0; u < U; ++u) {
      if (by_token) p[u] = exp2<T, true>(t[u], shift + box.shift[m + u]) * box.weight[m + u];
      else p[u] = exp2<T, kind == Variant::masked_and_shifted>(t[u], shift);
    }
    // Makes the compiler read the channels again from L1 below: it would run out of registers in the forward.
    if (FS > 0 && !Backward) asm("" : "+r"(tok));
    if (Backward) {
      const V start = by_token ? bonus : -delta;
      for (int u = 0; u < U; ++u) t[u] = fma(S::load(g_inner + u * S::lanes) + g_a, r[u], start);
      add_features<T, FS, U>(F, [&](int64_t f) { return g_feat[f]; },
                             [&](int64_t f, int u) { return S::set(tok[u * K + 1 + f]); }, t);
      for (int u = 0; u < U; ++u) {
        if (kind == Variant::dropped) t[u] = keep<T>(t[u], hashes, box.hashes[m + u], box.threshold);
        if (by_token) t[u] = t[u] - delta - delta_low - box.delta[m + u] - box.delta_low[m + u];
        p[u] *= t[u];
      }
    }
    for (int u = 0; u < U; ++u) {
      total += p[u];
      if (kind == Variant::dropped && !Backward) {
        p[u] = keep<T>(p[u], hashes, box.hashes[m + u], box.threshold);
        kept += p[u];
      }
      row_sum += p[u] * r[u];
      T* o = out_inner + u * S::lanes;
      S::store(o, S::load(o) + p[u] * r[u]);
    }
    for (int64_t f = 0; f < F; ++f) {
      V sum = acc[f];
      for (int u = 0; u < U; ++u) sum += p[u] * tok[u * K + 1 + f];
      acc[f] = sum;
    }
  }
};

template <class T, int FS, Variant kind, bool Backward>
void accumulate(const TokenBox<T>& box, const QueryBlock<T>& block) {
  using S = Simd<T>;
  using V = typename S::Vec;
  const int64_t F = FS > 0 ? FS : box.features;
  const int64_t lanes = S::lanes;
  const FlushDenormals flush;

  int64_t outer_total = 0;
  for (int64_t a = 0; a < box.outer_axes; ++a) outer_total += box.outer_sizes[a];
  const T* q_outer = block.q + F * lanes;
  const T* q_inner = q_outer + outer_total * lanes;
  const T* g_outer = Backward ? block.grad + F * lanes : nullptr;
  const T* g_inner = Backward ? g_outer + outer_total * lanes : q_inner;  // unread in the forward
  T* out_outer = block.out + F * lanes;
  T* out_inner = out_outer + outer_total * lanes;
  T* out_total = out_inner + box.inner_size * lanes;

  // Features: in registers when their number is known, else the packed tables and scratch.
  V q_local[FS > 0 ? FS : 1], g_local[FS > 0 ? FS : 1], row_local[FS > 0 ? FS + 1 : 1];
  const V* q_feat = reinterpret_cast<const V*>(block.q);
  const V* g_feat = reinterpret_cast<const V*>(block.grad);
  V* row_acc = reinterpret_cast<V*>(block.scratch);
  V* block_acc = row_acc + F + 1;
  if (FS > 0) {
    for (int f = 0; f < FS; ++f) q_local[f] = q_feat[f];
    q_feat = q_local;
    if (Backward) {
      for (int f = 0; f < FS; ++f) g_local[f] = g_feat[f];
      g_feat = g_local;
    }
    row_acc = row_local;
  }
  const V shift = S::load(block.shift);
  const V delta = Backward ? S::load(block.delta) : V{};
  constexpr bool by_token = kind == Variant::inverted || kind == Variant::dropped;
  const V delta_low = Backward && by_token ? S::load(block.delta_low) : V{};
  const V bonus = Backward && by_token ? S::load(block.bonus) : V{};

  const int64_t columns = box.col_end - box.col_begin;
  const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
  alignas(64) T tile_sums[kTileColumns * S::lanes];
  for (int64_t row0 = box.row_begin; row0 < box.row_end; row0 += kBlockRows) {
    const int64_t row1 = row0 + kBlockRows < box.row_end ? row0 + kBlockRows : box.row_end;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t j0 = box.col_begin + columns * tile / tiles;
      const int64_t j1 = box.col_begin + columns * (tile + 1) / tiles;
      for (int64_t i = 0; i < (j1 - j0) * lanes; ++i) tile_sums[i] = 0;
      for (int64_t f = 0; f <= F; ++f) block_acc[f] = V{};
      V block_kept{};
      OuterIndex outer(box.outer_axes, box.outer_sizes, row0);
      for (int64_t row = row0; row < row1; ++row, outer.next()) {
        const V a = outer.template sum<T>(q_outer);
        const V g_a = Backward ? outer.template sum<T>(g_outer) : V{};
        for (int64_t f = 0; f < F; ++f) row_acc[f] = V{};
        V total{}, kept{}, row_sum{};
        const int64_t m = row * box.inner_size;
        int64_t j = j0;
        const auto step = [&](auto unroll) {
          constexpr int U = decltype(unroll)::value;
          for (; j + U <= j1; j += U)
            Step<T, FS, U, kind, Backward>::run(box, m + j, q_inner + j * lanes, g_inner + j * lanes,
                                                tile_sums + (j - j0) * lanes, q_feat, g_feat, row_acc, total, kept,
                                                row_sum, a, g_a, shift, delta, delta_low, bonus, block.hashes);
        };
        step(Count<kUnroll>{});
        step(Count<1>{});
        outer.add(out_outer, row_sum);
        for (int64_t f = 0; f < F; ++f) block_acc[f] += row_acc[f];
        block_acc[F] += total;
        if (kind == Variant::dropped) block_kept += kept;
      }
      for (int64_t j = j0; j < j1; ++j) {
        T* o = out_inner + j * lanes;
        S::store(o, S::load(o) + S::load(tile_sums + (j - j0) * lanes));
      }
      for (int64_t f = 0; f < F; ++f) {
        T* o = block.out + f * lanes;
        S::store(o, S::load(o) + block_acc[f]);
      }
      S::store(out_total, S::load(out_total) + block_acc[F]);
      if (kind == Variant::dropped && !Backward) {
        T* out_kept = out_total + lanes;
        S::store(out_kept, S::load(out_kept) + block_kept);
      }
    }
  }
}

template <class T, bool Backward>
void accumulate_any(const TokenBox<T>& box, const QueryBlock<T>& block) {
  bool shifted = false;
  for (int lane = 0; lane < Simd<T>::lanes; ++lane) shifted |= block.shift[lane] != 0;
#define PF_CASE(FS)                                                                              \
  if (box.shift) return accumulate<T, FS, Variant::inverted, Backward>(box, block);              \
  if (shifted) return accumulate<T, FS, Variant::masked_and_shifted, Backward>(box, block);      \
  if (box.masked) return accumulate<T, FS, Variant::masked, Backward>(box, block);               \
  return accumulate<T, FS, Variant::plain, Backward>(box, block)
  // One variant for any number of features: what fixing it saves is little beside the hash.
  if (box.threshold != 0) return accumulate<T, 0, Variant::dropped, Backward>(box, block);
  switch (box.features) {
    case 1: PF_CASE(1);
    case 2: PF_CASE(2);
    case 3: PF_CASE(3);
    case 4: PF_CASE(4);
    default: PF_CASE(0);
  }
#undef PF_CASE
}

// Largest logit of every query: the first of two passes when the cheap bound was too loose.
template <class T>
void maximum(const TokenBox<T>& box, const T* q, T* max) {
  using S = Simd<T>;
  using V = typename S::Vec;
  const FlushDenormals flush;
  const int64_t F = box.features, K = F + 2;
  int64_t outer_total = 0;
  for (int64_t a = 0; a < box.outer_axes; ++a) outer_total += box.outer_sizes[a];
  const T* q_outer = q + F * S::lanes;
  const T* q_inner = q_outer + outer_total * S::lanes;
  V largest = S::load(max);
  OuterIndex outer(box.outer_axes, box.outer_sizes, box.row_begin);
  for (int64_t row = box.row_begin; row < box.row_end; ++row, outer.next()) {
    const V a = outer.template sum<T>(q_outer);
    for (int64_t j = box.col_begin; j < box.col_end; ++j) {
      const T* tok = box.tokens + (row * box.inner_size + j) * K;
      V t = (S::load(q_inner + j * S::lanes) + a) * tok[0] + S::set(tok[1 + F]);
      for (int64_t f = 0; f < F; ++f) t = fma(S::load(q + f * S::lanes), S::set(tok[1 + f]), t);
      largest = S::max(t, largest);
    }
  }
  S::store(max, largest);
}

}  // namespace PF_ISA
}  // namespace perceiver_fast
