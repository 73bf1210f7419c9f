// What latents in vector lanes are computed with, for one instruction set: what LayerNorm and softmax sum over runs
// down the lanes, so that no sum crosses them.
#include "dropout_mask.h"
#include "elements.h"
#include "latent_kernels.h"
#include "normal_distribution.h"
#include "tile_gemm.h"
#include "transpose.h"

namespace perceiver_fast {
namespace PF_ISA {

template <class T>
void product(int64_t rows, int64_t columns, int64_t depth, const T* w, int64_t w_row, int64_t w_step, const T* b,
             int64_t b_row, T* c, int64_t c_row, bool accumulate) {
  if (accumulate)
    tile_gemm<T, true>(rows, columns, depth, w, w_row, w_step, b, b_row, c, c_row);
  else
    tile_gemm<T, false>(rows, columns, depth, w, w_row, w_step, b, b_row, c, c_row);
}

// The sum over k of term(k), a vector of columns, in chains that need not wait for one another.
template <class T, class Term>
PF_INLINE typename Simd<T>::Vec sum_down(int64_t n, Term term) {
  typename Simd<T>::Vec chain[kChains] = {};
  int64_t k = 0;
  for (; k + kChains <= n; k += kChains)
    for (int i = 0; i < kChains; ++i) chain[i] += term(k + i);
  for (; k < n; ++k) chain[0] += term(k);
  return (chain[0] + chain[1]) + (chain[2] + chain[3]);
}

// The mean is shift + left: what a mean of one number is rounded by is not small where the mean is large and the
// deviations from it are not. Channels are divided before they are summed, since a sum of large ones could overflow.
template <class T>
void normalize(int64_t channels, int64_t columns, const T* x, double eps, T* xhat, T* rstd) {
  using S = Simd<T>;
  const auto share = S::set(T(1) / T(channels));
  for (int64_t c = 0; c < columns; c += S::lanes) {
    const auto at = [&](int64_t k) PF_INLINE_LAMBDA { return S::load(x + k * columns + c); };
    const auto shift = sum_down<T>(channels, [&](int64_t k) PF_INLINE_LAMBDA { return at(k) * share; });
    const auto left = sum_down<T>(channels, [&](int64_t k) PF_INLINE_LAMBDA { return (at(k) - shift) * share; });
    const auto square = sum_down<T>(channels, [&](int64_t k) PF_INLINE_LAMBDA {
      const auto off = at(k) - shift - left;
      return off * off;
    });
    T factor[S::lanes];
    S::store(factor, square / T(channels));
    for (int i = 0; i < S::lanes; ++i) factor[i] = T(1 / __builtin_sqrt(double(factor[i]) + eps));
    const auto scale = S::load(factor);
    S::store(rstd + c, scale);
    for (int64_t k = 0; k < channels; ++k) S::store(xhat + k * columns + c, (at(k) - shift - left) * scale);
  }
}

// With g = d_z weight, the gradient of x is rstd (g - mean(g) - xhat mean(g xhat)).
template <class T>
void normalize_backward(int64_t channels, int64_t columns, const T* d_z, const T* xhat, const T* rstd, const T* weight,
                        T* d_x, T* weight_sums, T* bias_sums) {
  using S = Simd<T>;
  for (int64_t c = 0; c < columns; c += S::lanes) {
    const auto g = [&](int64_t k) PF_INLINE_LAMBDA { return S::load(d_z + k * columns + c) * weight[k]; };
    const auto of = [&](int64_t k) PF_INLINE_LAMBDA { return S::load(xhat + k * columns + c); };
    const auto mean = sum_down<T>(channels, g) / T(channels);
    const auto slope =
        sum_down<T>(channels, [&](int64_t k) PF_INLINE_LAMBDA { return g(k) * of(k); }) / T(channels);
    const auto scale = S::load(rstd + c);
    for (int64_t k = 0; k < channels; ++k) {
      T* to = d_x + k * columns + c;
      S::store(to, S::load(to) + (g(k) - mean - of(k) * slope) * scale);
    }
  }
  for (int64_t k = 0; k < channels; ++k) {
    typename S::Vec by_weight{}, by_bias{};
    for (int64_t c = k * columns; c < (k + 1) * columns; c += S::lanes) {
      by_weight += S::load(d_z + c) * S::load(xhat + c);
      by_bias += S::load(d_z + c);
    }
    weight_sums[k] += sum_lanes(by_weight);
    bias_sums[k] += sum_lanes(by_bias);
  }
}

template <class T>
void affine(int64_t channels, int64_t columns, const T* xhat, const T* weight, const T* bias, T* z) {
  using S = Simd<T>;
  for (int64_t k = 0; k < channels; ++k)
    for (int64_t c = k * columns; c < (k + 1) * columns; c += S::lanes)
      S::store(z + c, S::load(xhat + c) * weight[k] + bias[k]);
}

template <class T>
void add_bias(int64_t channels, int64_t columns, const T* bias, T* x) {
  using S = Simd<T>;
  for (int64_t k = 0; k < channels; ++k)
    for (int64_t c = k * columns; c < (k + 1) * columns; c += S::lanes) S::store(x + c, S::load(x + c) + bias[k]);
}

template <class T>
void join(int64_t channels, int64_t columns, const T* branch, const T* bias, const T* noise, T* x) {
  using S = Simd<T>;
  for (int64_t k = 0; k < channels; ++k)
    for (int64_t c = k * columns; c < (k + 1) * columns; c += S::lanes) {
      const auto added = S::load(branch + c) + bias[k];
      S::store(x + c, S::load(x + c) + (noise ? added * S::load(noise + c) : added));
    }
}

template <class T>
void multiply(int64_t channels, int64_t columns, const T* x, const T* noise, T* to) {
  using S = Simd<T>;
  for (int64_t c = 0; c < channels * columns; c += S::lanes) S::store(to + c, S::load(x + c) * S::load(noise + c));
}

// The largest logit is taken off before they are scaled: of two large ones that differ by little, that leaves no more to be
// rounded than the little. A NaN that is lost in a maximum does no harm: its exponential is NaN, and so is the sum.
template <class T>
void softmax(int64_t tokens, int64_t columns, T* logits, double scale, T* most_of, T* sum_of) {
  using S = Simd<T>;
  constexpr double kLog2OfE = 1.4426950408889634074;
  const FlushDenormals flush;
  const T sign = scale < 0 ? T(-1) : T(1);  // what is scaled by less than zero is largest where it is smallest
  const auto factor = S::set(T(scale * kLog2OfE));
  for (int64_t c = 0; c < columns; c += S::lanes) {
    const auto at = [&](int64_t m) PF_INLINE_LAMBDA { return logits + m * columns + c; };
    auto most = S::load(at(0)) * sign;
    for (int64_t m = 1; m < tokens; ++m) most = S::max(most, S::load(at(m)) * sign);
    most *= sign;
    const auto sum = sum_down<T>(tokens, [&](int64_t m) PF_INLINE_LAMBDA {
      const auto weight = exp2<T, false>((S::load(at(m)) - most) * factor, typename S::Vec{});
      S::store(at(m), weight);
      return weight;
    });
    for (int64_t m = 0; m < tokens; ++m) S::store(at(m), S::load(at(m)) / sum);
    if (most_of == nullptr) continue;
    S::store(most_of + c, most);
    S::store(sum_of + c, sum);
  }
}

template <class T>
void drop(int64_t tokens, int64_t columns, const T* weights, const typename HashLane<T>::type* column_hashes,
          const uint32_t* token_hashes, uint32_t threshold, T factor, T* to) {
  using S = Simd<T>;
  for (int64_t m = 0; m < tokens; ++m)
    for (int64_t c = 0; c < columns; c += S::lanes) {
      const int64_t at = m * columns + c;
      S::store(to + at, keep<T>(S::load(weights + at) * factor, column_hashes + c, token_hashes[m], threshold));
    }
}

template <class T>
void softmax_backward(int64_t tokens, int64_t columns, const T* weights, T* d_weights, double scale, const T* d_lse) {
  using S = Simd<T>;
  const FlushDenormals flush;
  const auto factor = S::set(T(scale));
  for (int64_t c = 0; c < columns; c += S::lanes) {
    const auto mean = sum_down<T>(tokens, [&](int64_t m) PF_INLINE_LAMBDA {
      return S::load(weights + m * columns + c) * S::load(d_weights + m * columns + c);
    });
    // What is left of a sum that should be zero is the mean's own rounding, which of a saturated softmax is all there is.
    const auto left = sum_down<T>(tokens, [&](int64_t m) PF_INLINE_LAMBDA {
      return S::load(weights + m * columns + c) * (S::load(d_weights + m * columns + c) - mean);
    });
    const auto less = d_lse ? left - S::load(d_lse + c) : left;
    for (int64_t m = 0; m < tokens; ++m) {
      T* at = d_weights + m * columns + c;
      S::store(at, S::load(weights + m * columns + c) * (S::load(at) - mean - less) * factor);
    }
  }
}

template <class T>
void geglu(int64_t features, int64_t columns, const T* value_bias, const T* gate_bias, T* values, T* gates, T* u) {
  using S = Simd<T>;
  const FlushDenormals flush;
  for (int64_t f = 0; f < features; ++f)
    for (int64_t c = f * columns; c < (f + 1) * columns; c += S::lanes) {
      const auto value = S::load(values + c) + value_bias[f], gate = S::load(gates + c) + gate_bias[f];
      S::store(values + c, value);
      S::store(gates + c, gate);
      S::store(u + c, value * (gate * normal(gate).below));
    }
}

template <class T>
void geglu_backward(int64_t features, int64_t columns, const T* d_u, const T* values, const T* gates, T* u, T* d_values,
                    T* d_gates) {
  using S = Simd<T>;
  const FlushDenormals flush;
  for (int64_t c = 0; c < features * columns; c += S::lanes) {
    const auto value = S::load(values + c), gate = S::load(gates + c), d = S::load(d_u + c);
    const Normal<T> of = normal(gate);
    const auto gelu = gate * of.below;
    S::store(u + c, value * gelu);
    S::store(d_values + c, d * gelu);
    S::store(d_gates + c, d * value * (of.below + gate * of.density));
  }
}

template <class T>
void row_sums(int64_t rows, int64_t columns, const T* x, T* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    typename Simd<T>::Vec sum{};
    for (int64_t c = r * columns; c < (r + 1) * columns; c += Simd<T>::lanes) sum += Simd<T>::load(x + c);
    sums[r] += sum_lanes(sum);
  }
}

template <class T>
const LatentKernels<T>& latent_table() {
  static constexpr LatentKernels<T> table{product<T>,          transpose<T>, normalize<T>,
                                                normalize_backward<T>, affine<T>,    add_bias<T>, join<T>,
                                                multiply<T>,           softmax<T>, drop<T>,            softmax_backward<T>, geglu<T>,
                                                geglu_backward<T>,     row_sums<T>};
  return table;
}

template const LatentKernels<float>& latent_table<float>();
template const LatentKernels<double>& latent_table<double>();

}  // namespace PF_ISA
}  // namespace perceiver_fast
