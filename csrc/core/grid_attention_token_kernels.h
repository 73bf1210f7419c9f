// The loops of grid attention that sum over queries, for one instruction set. Here the lanes are consecutive columns
// of a row and the loop runs over the queries, so that sums over queries stay in registers and every token has one
// writer.
#pragma once

#include "grid_attention_query_kernels.h"

namespace perceiver_fast {
namespace PF_ISA {

// A vector of tokens: columns j .. j + count of one row.
template <class T>
struct TokenLanes {
  using S = Simd<T>;
  using V = typename S::Vec;
  const TokenBox<T>& box;
  int64_t m, count, stride;  // the first token, how many, and the size of a record

  V gather(int64_t k) const {
    alignas(64) T lanes[S::lanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = box.tokens[(m + i) * stride + k];
    return S::load(lanes);
  }
  V load(const T* of_tokens) const {
    alignas(64) T lanes[S::lanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = of_tokens[m + i];
    return S::load(lanes);
  }
  void store(T* to_tokens, V v) const {
    alignas(64) T lanes[S::lanes];
    S::store(lanes, v);
    for (int64_t i = 0; i < count; ++i) to_tokens[m + i] = lanes[i];
  }
};

// Calls body(tokens, inner) for every vector of tokens of a box, with g.row_sums holding every query's sums over the
// outer axes of that row: of q, then (when there is one) of the gradient. `inner` is where the vector's columns stand
// in a query's table.
template <class T, class Body>
PF_INLINE void for_each_vector(const TokenBox<T>& box, const TokenGradient<T>& g, const Body& body) {
  int64_t outer_total = 0;
  for (int64_t a = 0; a < box.outer_axes; ++a) outer_total += box.outer_sizes[a];
  OuterIndex outer(box.outer_axes, box.outer_sizes, box.row_begin);
  for (int64_t row = box.row_begin; row < box.row_end; ++row, outer.next()) {
    for (int64_t n = 0; n < g.queries; ++n) {
      T q_sum = 0, g_sum = 0;
      int64_t at = n * g.length + box.features;
      for (int64_t a = 0; a < box.outer_axes; at += box.outer_sizes[a], ++a) {
        q_sum += g.q[at + outer.index[a]];
        if (g.grad != nullptr) g_sum += g.grad[at + outer.index[a]];
      }
      g.row_sums[n] = q_sum;
      g.row_sums[g.queries + n] = g_sum;
    }
    for (int64_t j = box.col_begin; j < box.col_end; j += Simd<T>::lanes) {
      const int64_t count = box.col_end - j < Simd<T>::lanes ? box.col_end - j : Simd<T>::lanes;
      body(TokenLanes<T>{box, row * box.inner_size + j, count, box.features + 2}, box.features + outer_total + j);
    }
  }
}

// A vector of a query's table. The last vector of a row may reach beyond the table, which ends where the array does:
// its elements are copied one by one.
template <class T>
PF_INLINE typename Simd<T>::Vec table_at(const T* at, int64_t count) {
  if (count == Simd<T>::lanes) return Simd<T>::load(at);
  alignas(64) T tail[Simd<T>::lanes] = {};
  for (int64_t i = 0; i < count; ++i) tail[i] = at[i];
  return Simd<T>::load(tail);
}

// Adds the features' parts to S log2(e) and to u.
template <class T, int FS>
PF_INLINE void add_features(int64_t features, const typename Simd<T>::Vec* x, const T* q, const T* grad,
                            typename Simd<T>::Vec& t, typename Simd<T>::Vec& u) {
  const int64_t F = FS > 0 ? FS : features;
  for (int64_t f = 0; f < F; ++f) t = fma(Simd<T>::set(q[f]), x[f], t);
  add_features<T, FS, 1>(F, [&](int64_t f) { return Simd<T>::set(grad[f]); }, [&](int64_t f, int) { return x[f]; }, &u);
}

// FS > 0 fixes the number of features. ByToken: inverted attention or dropout.
template <class T, int FS, bool ByToken>
void token_gradient(const TokenBox<T>& box, const TokenGradient<T>& g) {
  using S = Simd<T>;
  using V = typename S::Vec;
  const FlushDenormals flush;
  const T ln2 = T(0.6931471805599453);
  const int64_t F = FS > 0 ? FS : box.features;
  V local[FS > 0 ? 3 * FS : 1];
  V* x = FS > 0 ? local : reinterpret_cast<V*>(g.columns);  // r x of a vector of tokens
  V *ds_q = x + F, *p_g = ds_q + F;                         // sums of dS q_feat and of P grad_feat
  for_each_vector(box, g, [&](const TokenLanes<T>& tokens, int64_t inner) {
    const V r = tokens.gather(0), bias = tokens.gather(1 + F);
    V token_shift{}, token_weight{}, token_delta{}, delta_low{};
    alignas(64) typename HashLane<T>::type hashes[S::lanes] = {};
    if (ByToken) {
      token_shift = tokens.load(box.shift);
      token_weight = tokens.load(box.weight);
      token_delta = tokens.load(box.delta);
      delta_low = tokens.load(box.delta_low);
      for (int64_t i = 0; i < tokens.count && box.threshold != 0; ++i) hashes[i] = box.hashes[tokens.m + i];
    }
    for (int64_t f = 0; f < F; ++f) {
      x[f] = tokens.gather(1 + f);
      ds_q[f] = p_g[f] = V{};
    }
    V ds_t{}, p_u{};
    for (int64_t n = 0; n < g.queries; ++n) {
      const T *q = g.q + n * g.length, *grad = g.grad + n * g.length;
      const V q_axes = table_at(q + inner, tokens.count) + g.row_sums[n];
      const V g_axes = table_at(grad + inner, tokens.count) + g.row_sums[g.queries + n];
      V t = q_axes * r + bias, u = fma(g_axes, r, S::set(ByToken ? g.bonus[n] : -g.delta[n]));
      add_features<T, FS>(F, x, q, grad, t, u);
      V p = exp2<T, true>(t, ByToken ? token_shift + g.shift[n] : S::set(g.shift[n])), kept = p;
      if (ByToken) {
        kept = p = p * token_weight;
        if (box.threshold != 0) {
          kept = keep<T>(p, hashes, g.hashes[n], box.threshold);
          u = keep<T>(u, hashes, g.hashes[n], box.threshold);
        }
        u = u - g.delta[n] - g.delta_low[n] - token_delta - delta_low;
      } else {
        u -= g.delta_low[n];
      }
      const V ds = p * u;
      for (int64_t f = 0; f < F; ++f) {
        ds_q[f] += ds * q[f];
        p_g[f] += kept * grad[f];
      }
      ds_t += ds * q_axes;
      p_u += kept * g_axes;
    }
    // The sums had q log2(e) for q. Channels enter dscale as x, not as r x / r, since a scale may be zero.
    V dr = ds_t * ln2 + p_u;
    alignas(64) T column[S::lanes] = {};
    for (int64_t begin = 0; begin < F; begin += kFeatureBlock) {
      V part{};
      for (int64_t f = begin; f < F && f < begin + kFeatureBlock; ++f) {
        const V dx = ds_q[f] * ln2 + p_g[f];
        for (int64_t i = 0; i < tokens.count; ++i) column[i] = g.feat[(tokens.m + i) * F + f];
        part += S::load(column) * dx;
        S::store(column, dx * r);
        for (int64_t i = 0; i < tokens.count; ++i) g.dfeat[(tokens.m + i) * F + f] = column[i];
      }
      dr += part;
    }
    tokens.store(g.dscale, dr);
  });
}

// S log2(e) of a vector of tokens and query n, by the operations of the forward.
template <class T, int FS>
PF_INLINE typename Simd<T>::Vec token_logits(const TokenLanes<T>& tokens, const TokenGradient<T>& g, int64_t inner,
                                             int64_t n, typename Simd<T>::Vec r, const typename Simd<T>::Vec* x) {
  const int64_t F = FS > 0 ? FS : tokens.box.features;
  const T* q = g.q + n * g.length;
  auto t = (table_at(q + inner, tokens.count) + g.row_sums[n]) * r;
  for (int64_t f = 0; f < F; ++f) t = fma(Simd<T>::set(q[f]), x[f], t);
  return t;
}

// Adds U queries to a running maximum and the sum of 2^(S - maximum), which is rescaled when one exceeds the maximum.
template <class T, int FS, int U>
PF_INLINE void add_queries(const TokenLanes<T>& tokens, const TokenGradient<T>& g, int64_t inner, int64_t n,
                           typename Simd<T>::Vec r, const typename Simd<T>::Vec* x, typename Simd<T>::Vec& top,
                           typename Simd<T>::Vec& total) {
  using S = Simd<T>;
  using V = typename S::Vec;
  V t[U], most = top;
  for (int u = 0; u < U; ++u) t[u] = token_logits<T, FS>(tokens, g, inner, n + u, r, x);
  for (int u = 0; u < U; ++u) most = S::max(t[u], most);
  const V rescaled = total * exp2<T, false>(top - most, V{});
  total = top == most ? total : rescaled;  // the computed 2^0 is one only up to rounding, which would add up
  top = most;
  V part{};
  for (int u = 0; u < U; ++u) part += exp2<T, false>(t[u] - most, V{});
  total += part;
}

template <class T, int FS>
void token_sums(const TokenBox<T>& box, const TokenGradient<T>& g, T* maximum, T* sum) {
  using S = Simd<T>;
  using V = typename S::Vec;
  const FlushDenormals flush;
  const int64_t F = FS > 0 ? FS : box.features;
  V local[FS > 0 ? FS : 1];
  V* x = FS > 0 ? local : reinterpret_cast<V*>(g.columns);
  for_each_vector(box, g, [&](const TokenLanes<T>& tokens, int64_t inner) {
    const V r = tokens.gather(0);
    for (int64_t f = 0; f < F; ++f) x[f] = tokens.gather(1 + f);
    V top = S::set(-__builtin_inff()), total{};
    int64_t n = 0;
    for (; n + kUnroll <= g.queries; n += kUnroll) add_queries<T, FS, kUnroll>(tokens, g, inner, n, r, x, top, total);
    for (; n < g.queries; ++n) add_queries<T, FS, 1>(tokens, g, inner, n, r, x, top, total);
    tokens.store(maximum, top);
    tokens.store(sum, total);
  });
}

template <class T, int FS>
void token_delta(const TokenBox<T>& box, const TokenGradient<T>& g, T* delta) {
  using S = Simd<T>;
  using V = typename S::Vec;
  const FlushDenormals flush;
  const int64_t F = FS > 0 ? FS : box.features;
  V local[FS > 0 ? FS : 1];
  V* x = FS > 0 ? local : reinterpret_cast<V*>(g.columns);
  for_each_vector(box, g, [&](const TokenLanes<T>& tokens, int64_t inner) {
    const V r = tokens.gather(0), shift = tokens.load(box.shift), weight = tokens.load(box.weight);
    for (int64_t f = 0; f < F; ++f) x[f] = tokens.gather(1 + f);
    alignas(64) typename HashLane<T>::type hashes[S::lanes] = {};
    for (int64_t i = 0; i < tokens.count && box.threshold != 0; ++i) hashes[i] = box.hashes[tokens.m + i];
    const V before = tokens.load(box.delta);
    V total{};
    for (int64_t n = 0; n < g.queries; ++n) {
      const T *q = g.q + n * g.length, *grad = g.grad + n * g.length;
      V t = (table_at(q + inner, tokens.count) + g.row_sums[n]) * r;
      V u = fma(table_at(grad + inner, tokens.count) + g.row_sums[g.queries + n], r, S::set(g.bonus[n]));
      add_features<T, FS>(F, x, q, grad, t, u);
      const V p = exp2<T, true>(t, shift + g.shift[n]) * weight;
      if (box.threshold != 0) u = keep<T>(u, hashes, g.hashes[n], box.threshold);
      total += p * (u - g.delta[n] - g.delta_low[n] - before);
    }
    tokens.store(delta, total);
  });
}

template <class T>
void token_sums_any(const TokenBox<T>& box, const TokenGradient<T>& g, T* maximum, T* sum) {
  switch (box.features) {
    case 2: return token_sums<T, 2>(box, g, maximum, sum);  // one channel and the bias of the keys
    case 4: return token_sums<T, 4>(box, g, maximum, sum);  // RGB and the bias of the keys
    default: return token_sums<T, 0>(box, g, maximum, sum);
  }
}

template <class T>
void token_delta_any(const TokenBox<T>& box, const TokenGradient<T>& g, T* delta) {
  switch (box.features) {
    case 2: return token_delta<T, 2>(box, g, delta);
    case 4: return token_delta<T, 4>(box, g, delta);
    default: return token_delta<T, 0>(box, g, delta);
  }
}

template <class T>
void token_gradient_any(const TokenBox<T>& box, const TokenGradient<T>& g) {
  if (box.shift != nullptr) return token_gradient<T, 0, true>(box, g);
  switch (box.features) {
    case 1: return token_gradient<T, 1, false>(box, g);
    case 2: return token_gradient<T, 2, false>(box, g);
    case 3: return token_gradient<T, 3, false>(box, g);
    case 4: return token_gradient<T, 4, false>(box, g);
    default: return token_gradient<T, 0, false>(box, g);
  }
}

}  // namespace PF_ISA
}  // namespace perceiver_fast
