// The inner loops of grid attention, forward and backward, for one instruction set.
//
// S[n,m] = r_m (sum_f q_feat[n,f] x_mf + sum_a q_axes_a[n, i_a(m)]); a token arrives as (r, r x), so a pair
// costs one add, F + 1 fused multiply-adds, one exp2 and F + 3 accumulations: 19 vector instructions for
// RGB on AVX-512, 24 in the backward.
//
// Every float sum is kept short: a tile of columns, then a block of rows, then the blocks. A chain is never
// longer than a few hundred terms, so the error does not grow with the number of tokens.
#pragma once

#include "grid_attention_block.h"
#include "simd.h"

#define PF_INLINE inline __attribute__((always_inline))

namespace perceiver_fast {
namespace PF_ISA {

constexpr int64_t kTileColumns = 128;  // table and sums of a tile: 16 KB of L1 at 64 bytes a vector
constexpr int64_t kBlockRows = 128;

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

// U consecutive tokens against one vector of queries. FS > 0 fixes the number of features at compile time
// and keeps q_feat and its sums in registers; FS = 0 reads them from memory, which U tokens share.
template <class T, int FS, int U, bool Masked, bool Backward>
struct Step {
  using S = Simd<T>;
  using V = typename S::Vec;

  static PF_INLINE void run(int64_t features, int64_t stride, const T* tok, const T* q_inner, const T* g_inner,
                            T* out_inner, const V* q_feat, const V* g_feat, V* acc, V& total, V& row_sum, V a,
                            V g_a, V offset, V g_offset) {
    const int64_t F = FS > 0 ? FS : features;
    V t[U], p[U], r[U];
    for (int u = 0; u < U; ++u) {
      r[u] = S::set(tok[u * stride]);
      V bias = offset;
      if (Masked) bias += S::set(tok[u * stride + 1 + F]);
      t[u] = (S::load(q_inner + u * S::lanes) + a) * r[u] + bias;
    }
    for (int64_t f = 0; f < F; ++f)
      for (int u = 0; u < U; ++u) t[u] += q_feat[f] * tok[u * stride + 1 + f];
    for (int u = 0; u < U; ++u) p[u] = exp2(t[u]);
    if (Backward) {
      for (int u = 0; u < U; ++u) t[u] = (S::load(g_inner + u * S::lanes) + g_a) * r[u] + g_offset;
      for (int64_t f = 0; f < F; ++f)
        for (int u = 0; u < U; ++u) t[u] += g_feat[f] * tok[u * stride + 1 + f];
      for (int u = 0; u < U; ++u) p[u] *= t[u];
    }
    for (int u = 0; u < U; ++u) {
      total += p[u];
      row_sum += p[u] * r[u];
      T* o = out_inner + u * S::lanes;
      S::store(o, S::load(o) + p[u] * r[u]);
    }
    for (int64_t f = 0; f < F; ++f) {
      V sum = acc[f];
      for (int u = 0; u < U; ++u) sum += p[u] * tok[u * stride + 1 + f];
      acc[f] = sum;
    }
  }
};

template <class T, int FS, bool Masked, bool Backward>
void accumulate(const TokenBox<T>& box, const QueryBlock<T>& block) {
  using S = Simd<T>;
  using V = typename S::Vec;
  constexpr int kUnroll = FS > 0 ? 2 : 4;
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
  const V offset = S::load(block.offset);
  const V g_offset = Backward ? S::load(block.grad_offset) : V{};

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
      OuterIndex outer(box.outer_axes, box.outer_sizes, row0);
      for (int64_t row = row0; row < row1; ++row, outer.next()) {
        const V a = outer.template sum<T>(q_outer);
        const V g_a = Backward ? outer.template sum<T>(g_outer) : V{};
        for (int64_t f = 0; f < F; ++f) row_acc[f] = V{};
        V total{}, row_sum{};
        const T* tok = box.tokens + (row * box.inner_size + j0) * box.token_stride;
        int64_t j = j0;
        for (; j + kUnroll <= j1; j += kUnroll, tok += kUnroll * box.token_stride)
          Step<T, FS, kUnroll, Masked, Backward>::run(
              F, box.token_stride, tok, q_inner + j * lanes, g_inner + j * lanes, tile_sums + (j - j0) * lanes,
              q_feat, g_feat, row_acc, total, row_sum, a, g_a, offset, g_offset);
        for (; kUnroll > 1 && j < j1; ++j, tok += box.token_stride)
          Step<T, FS, 1, Masked, Backward>::run(
              F, box.token_stride, tok, q_inner + j * lanes, g_inner + j * lanes, tile_sums + (j - j0) * lanes,
              q_feat, g_feat, row_acc, total, row_sum, a, g_a, offset, g_offset);
        outer.add(out_outer, row_sum);
        for (int64_t f = 0; f < F; ++f) block_acc[f] += row_acc[f];
        block_acc[F] += total;
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
    }
  }
}

template <class T, bool Backward>
void accumulate_any(const TokenBox<T>& box, const QueryBlock<T>& block) {
#define PF_CASE(FS)                                                     \
  return box.masked ? accumulate<T, FS, true, Backward>(box, block)     \
                    : accumulate<T, FS, false, Backward>(box, block)
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
  int64_t outer_total = 0;
  for (int64_t a = 0; a < box.outer_axes; ++a) outer_total += box.outer_sizes[a];
  const T* q_outer = q + box.features * S::lanes;
  const T* q_inner = q_outer + outer_total * S::lanes;
  V largest = S::load(max);
  OuterIndex outer(box.outer_axes, box.outer_sizes, box.row_begin);
  for (int64_t row = box.row_begin; row < box.row_end; ++row, outer.next()) {
    const V a = outer.template sum<T>(q_outer);
    for (int64_t j = box.col_begin; j < box.col_end; ++j) {
      const T* tok = box.tokens + (row * box.inner_size + j) * box.token_stride;
      V t = (S::load(q_inner + j * S::lanes) + a) * tok[0];
      if (box.masked) t += S::set(tok[1 + box.features]);
      for (int64_t f = 0; f < box.features; ++f) t += S::load(q + f * S::lanes) * tok[1 + f];
      largest = S::max(t, largest);
    }
  }
  S::store(max, largest);
}

// Gradients of the tokens: here the lanes are consecutive columns of a row and the queries run in the loop,
// so that the sums over queries stay in registers and no two threads write the same token.
template <class T, int FS>
void token_gradient(const TokenBox<T>& box, const TokenGradient<T>& g) {
  using S = Simd<T>;
  using V = typename S::Vec;
  const FlushDenormals flush;
  const T log2e = T(1.4426950408889634);
  const int64_t F = FS > 0 ? FS : box.features;
  int64_t outer_total = 0;
  for (int64_t a = 0; a < box.outer_axes; ++a) outer_total += box.outer_sizes[a];
  T* q_row = g.row_sums;  // per query: sums of q and of grad over this row's outer indices
  T* g_row = q_row + g.queries;
  V local[FS > 0 ? 2 * FS : 1];
  OuterIndex outer(box.outer_axes, box.outer_sizes, box.row_begin);
  for (int64_t row = box.row_begin; row < box.row_end; ++row, outer.next()) {
    for (int64_t n = 0; n < g.queries; ++n) {
      T q_sum = 0, g_sum = 0;
      int64_t at = F;
      for (int64_t a = 0; a < box.outer_axes; at += box.outer_sizes[a], ++a) {
        q_sum += g.q[n * g.q_stride + at + outer.index[a]];
        g_sum += g.grad[n * g.grad_stride + at + outer.index[a]];
      }
      q_row[n] = q_sum;
      g_row[n] = g_sum;
    }
    for (int64_t j = box.col_begin; j < box.col_end; j += S::lanes) {
      const int64_t count = box.col_end - j < S::lanes ? box.col_end - j : S::lanes;
      const int64_t m = row * box.inner_size + j;
      alignas(64) T r_tile[S::lanes] = {}, drop[S::lanes] = {}, q_tail[S::lanes] = {}, g_tail[S::lanes] = {};
      for (int64_t i = 0; i < count; ++i) {
        r_tile[i] = g.scale[m + i];
        drop[i] = g.mask == nullptr || g.mask[m + i] ? T(0) : T(-1) / T(0);
      }
      const V r = S::load(r_tile), bias = S::load(drop), r2 = r * log2e;
      // x [F] and dx [F], a vector of tokens each.
      V* x = FS > 0 ? local : reinterpret_cast<V*>(g.columns);
      V* dx = x + F;
      for (int64_t f = 0; f < F; ++f) {
        alignas(64) T column[S::lanes] = {};
        for (int64_t i = 0; i < count; ++i) column[i] = g.feat[(m + i) * F + f];
        x[f] = S::load(column);
        dx[f] = V{};
      }
      V dr{};
      for (int64_t n = 0; n < g.queries; ++n) {
        const T* qn = g.q + n * g.q_stride;
        const T* gn = g.grad + n * g.grad_stride;
        const T* q_inner = qn + F + outer_total + j;
        const T* g_inner = gn + F + outer_total + j;
        if (count < S::lanes) {
          for (int64_t i = 0; i < count; ++i) q_tail[i] = q_inner[i], g_tail[i] = g_inner[i];
          q_inner = q_tail;
          g_inner = g_tail;
        }
        V t = S::load(q_inner) + q_row[n];
        V u = S::load(g_inner) + g_row[n];
        for (int64_t f = 0; f < F; ++f) {
          t += x[f] * qn[f];
          u += x[f] * gn[f];
        }
        const V p = exp2(t * r2 + (bias + g.offset[n])) * g.weight[n];
        const V ds = p * (r * u - g.delta[n]);
        for (int64_t f = 0; f < F; ++f) dx[f] += ds * qn[f] + p * gn[f];
        dr += ds * t + p * u;
      }
      alignas(64) T result[S::lanes];
      for (int64_t f = 0; f < F; ++f) {
        S::store(result, dx[f] * r);
        for (int64_t i = 0; i < count; ++i) g.dfeat[(m + i) * F + f] = result[i];
      }
      S::store(result, dr);
      for (int64_t i = 0; i < count; ++i) g.dscale[m + i] = result[i];
    }
  }
}

template <class T>
void token_gradient_any(const TokenBox<T>& box, const TokenGradient<T>& g) {
  switch (box.features) {
    case 1: return token_gradient<T, 1>(box, g);
    case 2: return token_gradient<T, 2>(box, g);
    case 3: return token_gradient<T, 3>(box, g);
    case 4: return token_gradient<T, 4>(box, g);
    default: return token_gradient<T, 0>(box, g);
  }
}

template <class T>
constexpr GridAttentionKernels<T> kernels{Simd<T>::lanes, accumulate_any<T, false>, accumulate_any<T, true>,
                                          maximum<T>, token_gradient_any<T>};

}  // namespace PF_ISA
}  // namespace perceiver_fast
