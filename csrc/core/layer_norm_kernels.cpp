// LayerNorm row by row, forward and backward, for one instruction set. A row is read from memory once: it stays in the
// first-level cache for the passes that follow.
#include "elements.h"
#include "layer_norm.h"

namespace perceiver_fast {
namespace PF_ISA {

// Statistics of a row. Its mean is shift + left: what a mean of one number is rounded by is not small where the mean is
// large and the deviations from it are not. row - shift is exact where that matters.
template <class T>
struct Statistics {
  T shift, left, variance;
};

// The mean of the squares of what the mean shift + left leaves of a row.
template <class T, class X>
T variance_about(const X* row, int64_t n, T shift, T left) {
  Sum<T> square;
  for_vectors<T, kChains>(n, [&](int64_t i, int chain, auto at) PF_INLINE_LAMBDA {
    const auto off = at.inside(at.load(row + i) - shift - left);
    square.chain[chain] += off * off;
  });
  return square.total() / T(n);
}

// Of a row whose sum overflowed, or whose squares did: divided first, and then summed.
template <class T, class X>
Statistics<T> large_statistics(const X* row, int64_t n) {
  Sum<T> middle;
  for_vectors<T, kChains>(n, [&](int64_t i, int chain, auto at) PF_INLINE_LAMBDA {
    middle.chain[chain] += at.load(row + i) / T(n);
  });
  const T mean = middle.total();
  return {mean, T(0), variance_about(row, n, mean, T(0))};
}

// Of the n values of a row, given their sum: `left` is the mean of the deviations from the rounded sum / n.
template <class T, class X>
PF_INLINE Statistics<T> statistics(const X* row, int64_t n, T sum) {
  const T shift = sum / T(n);
  Sum<T> rest, square;
  for_vectors<T, kChains>(n, [&](int64_t i, int chain, auto at) PF_INLINE_LAMBDA {
    const auto off = at.inside(at.load(row + i) - shift);
    rest.chain[chain] += off;
    square.chain[chain] += off * off;
  });
  const T left = rest.total() / T(n), spread = square.total() / T(n) - left * left;
  if (!(spread - spread == 0)) return large_statistics<T>(row, n);
  if (spread < left * left / 64)  // nothing but the rounding of sum / n
    return {shift, left, variance_about(row, n, shift, left)};
  return {shift, left, spread};
}

template <class D>
void layer_norm_rows(const LayerNormForward<D>& call, int64_t begin, int64_t end) {
  using T = typename D::T;
  using S = typename D::Wide;
  const int64_t n = call.columns;
  for (int64_t r = begin; r < end; ++r) {
    const auto* branch = call.branch == nullptr ? nullptr : call.branch + r * n;
    const S* x = call.x + r * n;
    Sum<T> sum;
    if (branch == nullptr) {
      for_vectors<T, kChains>(n, [&](int64_t i, int chain, auto at) PF_INLINE_LAMBDA {
        sum.chain[chain] += at.load(x + i);
      });
    } else {
      S* y = call.y + r * n;
      const S* branch_bias = call.branch_bias;
      for_vectors<T, kChains>(n, [&](int64_t i, int chain, auto at) PF_INLINE_LAMBDA {
        auto joining = at.load(branch + i);
        if (branch_bias != nullptr) joining += at.load(branch_bias + i);
        const auto joined = Elements<S>::rounded(at.load(x + i) + joining);
        at.store(y + i, joined);
        sum.chain[chain] += joined;
      });
      x = y;
    }
    const Statistics<T> of = statistics(x, n, sum.total());
    const T shift = of.shift, left = of.left, rstd = T(1 / __builtin_sqrt(double(of.variance) + call.eps));
    auto* z = call.z + r * n;
    const S *weight = call.weight, *bias = call.bias;
    for_vectors<T, kChains>(n, [&](int64_t i, int, auto at) PF_INLINE_LAMBDA {
      at.store(z + i, (at.load(x + i) - shift - left) * rstd * at.load(weight + i) + at.load(bias + i));
    });
    call.mean[r] = shift + left;
    call.rstd[r] = rstd;
  }
}

// The mean of a row is stored as one number; what it was rounded by, `left`, is computed again.
//
// With xhat = (y - mean) rstd and g = d_z weight, the gradient of y is rstd (g - mean(g) - xhat mean(g xhat)) + d_y.
template <class D>
void layer_norm_gradient_rows(const LayerNormBackward<D>& call, int64_t begin, int64_t end, typename D::T* sums) {
  using T = typename D::T;
  const int64_t n = call.columns;
  const auto* weight = call.weight;
  T *d_weight = sums, *d_bias = d_weight + n, *d_branch_bias = d_bias + n;
  for (int64_t r = begin; r < end; ++r) {
    const T mean = call.mean[r], rstd = call.rstd[r];
    const auto* d_z = call.d_z + r * n;
    const auto *y = call.y + r * n, *d_y = call.d_y == nullptr ? nullptr : call.d_y + r * n;
    Sum<T> sum, slope, rest;
    for_vectors<T, kChains>(n, [&](int64_t i, int chain, auto at) PF_INLINE_LAMBDA {
      const auto g = at.load(d_z + i) * at.load(weight + i), off = at.inside(at.load(y + i) - mean);
      rest.chain[chain] += off;
      sum.chain[chain] += g;
      slope.chain[chain] += g * (off * rstd);
    });
    T left = rest.total() / T(n);
    if (!(left - left == 0)) left = 0;  // the sum overflowed: of such numbers nothing smaller is left
    const T g_mean = sum.total() / T(n), g_slope = slope.total() / T(n) - left * rstd * g_mean;
    auto* d_x = call.d_x + r * n;
    auto* d_branch = call.d_branch == nullptr ? nullptr : call.d_branch + r * n;
    const bool branch_bias = call.d_branch_bias != nullptr;
    for_vectors<T, kChains>(n, [&](int64_t i, int, auto at) PF_INLINE_LAMBDA {
      const auto d = at.load(d_z + i), xhat = (at.load(y + i) - mean - left) * rstd;
      auto gradient = (d * at.load(weight + i) - g_mean - xhat * g_slope) * rstd;
      if (d_y != nullptr) gradient += at.load(d_y + i);
      at.store(d_x + i, gradient);
      if (d_branch != nullptr) at.store(d_branch + i, gradient);
      at.store(d_weight + i, at.load(d_weight + i) + d * xhat);
      at.store(d_bias + i, at.load(d_bias + i) + d);
      if (branch_bias) at.store(d_branch_bias + i, at.load(d_branch_bias + i) + gradient);
    });
  }
}

template <class D>
const LayerNormKernels<D>& layer_norm_table() {
  static constexpr LayerNormKernels<D> table{layer_norm_rows<D>, layer_norm_gradient_rows<D>};
  return table;
}

#define PF_INSTANTIATE(D) template const LayerNormKernels<D>& layer_norm_table<D>();
PF_FOR_DTYPES(PF_INSTANTIATE)

}  // namespace PF_ISA
}  // namespace perceiver_fast
