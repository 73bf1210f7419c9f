// The backward of grid_query_attention for one instruction set:
//
//   u = v d_o     delta = sum_n P u     dS = P (u - delta)     d_v = P^T d_o
//   d_feat = sum over queries of dS r x, and likewise of dS r for the index that a query has on an axis;  d_bias of dS
//   d_x = sum over keys of dS feat;  d_r of dS times the part by axes (channels' part: from d_x, at the end)
//
// P is computed anew: exponents are shifted by lse, and the weights divided by their sum. So sum_n dS is zero up to
// rounding however well lse is known. delta is a sum of two numbers, the second one the rounding error of the first:
// a query that one key has nearly all of gets its tiny gradients and not that error.
#pragma once

#include "elements.h"
#include "grid_query_attention_strips.h"

namespace perceiver_fast {
namespace PF_ISA {

template <class T>
PF_INLINE int64_t padded(int64_t channels) {
  return (channels + Simd<T>::lanes - 1) / Simd<T>::lanes * Simd<T>::lanes;
}

// What a strip needs: weights and gradients of all keys, the gradient of the output as columns and as rows, and rows
// (r x, r, 1) that sums over its queries are products with.
template <class T>
struct StripGradients {
  T *p, *ds, *grad, *grad_rows, *extra_rows;
  static PF_INLINE int64_t size(int64_t features, int64_t channels, int64_t keys) {
    return (2 * keys + channels + padded<T>(channels) + padded<T>(features + 2)) * kStrip<T>;
  }
  PF_INLINE StripGradients(T* at, int64_t channels, int64_t keys)
      : p(at),
        ds(p + keys * kStrip<T>),
        grad(ds + keys * kStrip<T>),
        grad_rows(grad + channels * kStrip<T>),
        extra_rows(grad_rows + padded<T>(channels) * kStrip<T>) {}
};

// Those of every strip, the sums of a row's outer axes, and products of a strip's queries for all keys.
template <class T>
int64_t backward_scratch(int64_t strips, int64_t features, int64_t channels, int64_t keys) {
  return strips * StripGradients<T>::size(features, channels, keys) + (1 + padded<T>(features + 2)) * keys;
}

template <class T>
void load_gradients(const QueryRows<T>& rows, const QueryGroup<T>& group, const QueryBackward<T>& b, int64_t s,
                    const StripGradients<T>& strip) {
  const int64_t W = kStrip<T>, C = b.channels, pad = padded<T>(C), F = rows.features, extra = padded<T>(F + 2);
  const StripPlace at = place_of(rows, group.first + s);
  for (int64_t i = 0; i < pad * W; ++i) strip.grad_rows[i] = 0;
  for (int64_t lane = 0; lane < at.count; ++lane) {
    const T* d_o = b.d_o + (at.first + lane) * b.query_stride;
    for (int64_t c = 0; c < C; ++c) strip.grad_rows[lane * pad + c] = d_o[c] * b.keep_scale;
  }
  transpose(W, C, strip.grad_rows, pad, strip.grad, W);
  const T *x = group.x + s * F * W, *r = group.r + s * W;
  transpose(F, W, x, W, strip.extra_rows, extra);
  for (int64_t lane = 0; lane < W; ++lane) {
    T* row = strip.extra_rows + lane * extra + F;
    row[0] = r[lane];
    row[1] = lane < at.count ? T(1) : T(0);
    for (int64_t i = 2; i < extra - F; ++i) row[i] = 0;
  }
}

// Weights up to their sum, which is added to `total`; `tile` has the channels' part of the logits before.
template <class T, Source From>
PF_INLINE void strip_weights(const StripKeys<T>& k, const typename Simd<T>::Vec* shift, typename Simd<T>::Vec* total) {
  using S = Simd<T>;
  typename S::Vec r[kStripVectors], part[kStripVectors] = {};
  for (int u = 0; u < kStripVectors; ++u) r[u] = S::load(k.r + u * S::lanes);
  for (int64_t n = 0; n < k.count; ++n)
    for (int u = 0; u < kStripVectors; ++u) {
      const auto p = weight<T, From>(k, n, u * S::lanes, r[u], shift[u]);
      part[u] += p;
      S::store(k.tile + n * kStrip<T> + u * S::lanes, p);
    }
  for (int u = 0; u < kStripVectors; ++u) total[u] += part[u];
}

// Of a strip: the weights' inverse sum, and delta.
template <class T>
struct StripMeans {
  typename Simd<T>::Vec inverse[kStripVectors], delta[kStripVectors], delta_low[kStripVectors];
};

// sum_n p (u - delta) of a strip.
template <class T>
PF_INLINE void sum_products(const StripGradients<T>& strip, int64_t begin, int64_t end,
                            const typename Simd<T>::Vec* delta, typename Simd<T>::Vec* sum) {
  using S = Simd<T>;
  typename S::Vec part[kStripVectors] = {};
  for (int64_t n = begin; n < end; ++n)
    for (int u = 0; u < kStripVectors; ++u) {
      const int64_t i = n * kStrip<T> + u * S::lanes;
      part[u] += S::load(strip.p + i) * (S::load(strip.ds + i) - delta[u]);
    }
  for (int u = 0; u < kStripVectors; ++u) sum[u] += part[u];
}

// The weights and their gradients u of a strip in p and ds, and their means.
template <class T, Source From>
void strip_products(const QueryRows<T>& rows, const QueryKeys<T>& keys, const QueryGroup<T>& group,
                    const QueryBackward<T>& b, int64_t s, const StripGradients<T>& strip, T* sums,
                    StripMeans<T>& means) {
  using S = Simd<T>;
  using V = typename S::Vec;
  const int64_t W = kStrip<T>, N = keys.count, C = b.channels, each = block_keys(N);
  const StripPlace at = place_of(rows, group.first + s);
  alignas(64) T shift_of[kStrip<T>];
  for (int64_t lane = 0; lane < W; ++lane)  // lanes without a query have no weights
    shift_of[lane] = lane < at.count ? T(-__builtin_nearbyint(b.lse[at.first + lane])) : T(-1e30);
  V shift[kStripVectors], total[kStripVectors] = {}, zero[kStripVectors] = {};
  for (int u = 0; u < kStripVectors; ++u) means.delta[u] = means.delta_low[u] = V{};
  for (int u = 0; u < kStripVectors; ++u) shift[u] = S::load(shift_of + u * S::lanes);
  const auto* hashes = b.hashes + (b.threshold != 0 ? s * W : 0);
  for (int64_t begin = 0; begin < N; begin += each) {
    const int64_t count = N - begin < each ? N - begin : each;
    T *p = strip.p + begin * W, *ds = strip.ds + begin * W;
    const StripKeys<T> k = strip_keys(rows, keys, group, s, begin, count, sums + begin, p);
    if (b.constant) {
      for (int64_t i = 0; i < count * W; ++i) p[i] = 1;
      for (int u = 0; u < kStripVectors; ++u) total[u] += T(count);
    } else {
      strip_weights<T, From>(k, shift, total);
    }
    tile_gemm<T, false>(count, W, C, keys.v + begin * C, C, 1, strip.grad, W, ds, W);
    for (int64_t n = 0; n < count && b.threshold != 0; ++n)
      for (int u = 0; u < kStripVectors; ++u) {
        T* u_at = ds + n * W + u * S::lanes;
        S::store(u_at, keep<T>(S::load(u_at), hashes + u * S::lanes, keys.hashes[begin + n], b.threshold));
      }
    sum_products(strip, begin, begin + count, zero, means.delta);
  }
  for (int u = 0; u < kStripVectors; ++u) {
    means.inverse[u] = S::set(1) / S::max(S::set(T(1e-30)), total[u]);  // NaN, the second operand, stays
    means.delta[u] *= means.inverse[u];
  }
  for (int64_t begin = 0; begin < N; begin += each)
    sum_products(strip, begin, N - begin < each ? N : begin + each, means.delta, means.delta_low);
  for (int u = 0; u < kStripVectors; ++u) means.delta_low[u] *= means.inverse[u];
}

// Weights to P, without those that are dropped, and u to dS; adds to the gradients of the columns' table and to d_r.
template <class T, bool Grid, bool Dropped>
void strip_logit_gradients(const QueryRows<T>& rows, const QueryKeys<T>& keys, const QueryGroup<T>& group,
                           const QueryBackward<T>& b, int64_t s, const StripGradients<T>& strip, const T* sums,
                           const StripMeans<T>& means) {
  using S = Simd<T>;
  using V = typename S::Vec;
  const int64_t W = kStrip<T>, N = keys.count;
  const StripPlace at = place_of(rows, group.first + s);
  const auto* hashes = b.hashes + (Dropped ? s * W : 0);
  const T* r_at = group.r + s * W;
  const T* columns = Grid ? keys.columns + at.strip * N * W : nullptr;
  T* d_columns = Grid ? b.d_columns + at.strip * N * W : nullptr;
  const StripKeys<T> k{N, columns, sums, nullptr, nullptr, nullptr, nullptr};
  for (int64_t begin = 0; begin < N; begin += kBlockKeys) {
    const int64_t end = N - begin < kBlockKeys ? N : begin + kBlockKeys;
    V d_r[kStripVectors] = {};
    for (int64_t n = begin; n < end; ++n)
      for (int u = 0; u < kStripVectors; ++u) {
        const int64_t i = n * W + u * S::lanes;
        V p = S::load(strip.p + i) * means.inverse[u];
        const V ds = b.constant ? V{} : p * (S::load(strip.ds + i) - means.delta[u] - means.delta_low[u]);
        if (Dropped) p = keep<T>(p, hashes + u * S::lanes, keys.hashes[n], b.threshold);
        S::store(strip.p + i, p);
        S::store(strip.ds + i, ds);
        if (!Grid) continue;
        d_r[u] += ds * axes_part(k, n, u * S::lanes);
        S::store(d_columns + i, fma(S::load(r_at + u * S::lanes), ds, S::load(d_columns + i)));
      }
    if (!Grid || b.d_r == nullptr) continue;
    for (int u = 0; u < kStripVectors; ++u) {
      T* to = b.d_r + s * W + u * S::lanes;
      S::store(to, S::load(to) + d_r[u]);
    }
  }
}

// Adds a strip's sums over its queries of dS (r x, r, 1), and of dS r to the indices of the outer axes.
template <class T>
void add_sums(const QueryRows<T>& rows, const QueryKeys<T>& keys, const QueryGroup<T>& group,
              const QueryBackward<T>& b, int64_t s, const StripGradients<T>& strip, T* products) {
  const int64_t W = kStrip<T>, N = keys.count, F = rows.features, extra = padded<T>(F + 2);
  tile_gemm<T, false>(N, extra, W, strip.ds, W, 1, strip.extra_rows, extra, products, extra);
  for (int64_t i = 0; i < N * extra; ++i) b.d_extra[i] += products[i];
  int64_t row = place_of(rows, group.first + s).row, first = rows.outer_total;
  for (int64_t a = rows.outer_axes; a-- > 0; row /= rows.outer_sizes[a]) {
    first -= rows.outer_sizes[a];
    T* table = b.d_outer + (first + row % rows.outer_sizes[a]) * N;
    for (int64_t n = 0; n < N; ++n) table[n] += products[n * extra + F];
  }
}

template <class T>
void backward(const QueryRows<T>& rows, const QueryKeys<T>& keys, const QueryGroup<T>& group,
              const QueryBackward<T>& b) {
  const FlushDenormals flush;
  const int64_t W = kStrip<T>, N = keys.count, C = b.channels, F = rows.features, pad = padded<T>(C);
  const int64_t size = StripGradients<T>::size(F, C, N);
  T *products = b.scratch + group.count * size, *sums = products + padded<T>(F + 2) * N;
  for (int64_t s = 0; s < group.count; ++s) {
    const StripGradients<T> strip(b.scratch + s * size, C, N);
    load_gradients(rows, group, b, s, strip);
    StripMeans<T> means;
    with_source(rows, [&](auto source) {
      strip_products<T, decltype(source)::from>(rows, keys, group, b, s, strip, sums, means);
    });
    const T* row = rows.outer_axes == 1 ? row_sums(rows, keys, place_of(rows, group.first + s).row, 0, N, sums) : sums;
    const bool dropped = b.threshold != 0;
    const auto logits = rows.grid ? dropped ? strip_logit_gradients<T, true, true> : strip_logit_gradients<T, true, false>
                        : dropped ? strip_logit_gradients<T, false, true>
                                  : strip_logit_gradients<T, false, false>;
    logits(rows, keys, group, b, s, strip, row, means);
    if (b.constant) continue;
    add_sums(rows, keys, group, b, s, strip, products);
    if (F > 0 && b.d_x != nullptr)
      tile_gemm<T, true>(F, W, N, keys.feat, 1, F, strip.ds, W, b.d_x + s * F * W, W);
  }
  // A few keys at a time, so that their sums stay in cache for all strips.
  for (int64_t begin = 0; begin < N; begin += 4 * kGemmRows)
    for (int64_t s = 0; s < group.count; ++s) {
      const StripGradients<T> strip(b.scratch + s * size, C, N);
      const int64_t count = N - begin < 4 * kGemmRows ? N - begin : 4 * kGemmRows;
      tile_gemm<T, true>(count, pad, W, strip.p + begin * W, W, 1, strip.grad_rows, pad, b.d_v + begin * pad, pad);
    }
}

// What is left to do when all heads are summed up.
template <class T>
void finish(const QueryRows<T>& rows, const QueryGroup<T>& group, T* d_x, const T* d_r, T* d_feat, T* d_scale) {
  const int64_t W = kStrip<T>, F = rows.features;
  for (int64_t s = 0; s < group.count; ++s) {
    const StripPlace at = place_of(rows, group.first + s);
    for (int64_t lane = 0; lane < at.count; ++lane) {
      const int64_t m = at.first + lane;
      const T r = group.r[s * W + lane];
      T sum = rows.grid ? d_r[s * W + lane] : T(0);
      for (int64_t f = 0; f < F; ++f) {
        const T grad = rows.blank ? T(0) : d_x[(s * F + f) * W + lane];
        if (!rows.blank) sum += grad * rows.feat[m * F + f];
        d_feat[m * F + f] = grad * r;
      }
      if (d_scale != nullptr) d_scale[m] = rows.blank ? T(0) : sum;
    }
  }
}

}  // namespace PF_ISA
}  // namespace perceiver_fast
