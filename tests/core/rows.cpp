// layer_norm and geglu, forward and backward, against plain loops in double: one row and one column, every remainder of
// the vectors' length, every pair of dtypes, with and without what is optional.
#include <cmath>
#include <vector>

#include "../../csrc/core/geglu.h"
#include "../../csrc/core/layer_norm.h"
#include "check.h"

using namespace perceiver_fast;

namespace {

using Numbers = std::vector<double>;

// Ranges run one index after the other, the last one first: results must not hang on the order.
const Parallel backwards{3, [](int64_t n, const auto& body) {
                           for (int64_t i = n; i-- > 0;) body(i, i + 1);
                         }};

template <class X>
void set(X& to, double x) {
  to = X(x);
}
void set(BFloat16& to, double x) {  // rounds towards zero, which is as good for an input
  const float value = float(x);
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  to.bits = uint16_t(bits >> 16);
}
template <class X>
constexpr double kRounding = sizeof(X) == 8   ? 1e-13
                             : sizeof(X) == 4 ? 3e-6
                                              : 0.008;  // of outputs of ordinary size

// An input of random numbers that dtype X has, between guards, and the same as doubles.
template <class X>
struct Input {
  Guarded<X> array;
  Numbers exact;
  Input(int64_t count, uint64_t seed, double magnitude = 1) : array(count), exact(count) {
    Random random{seed};
    for (int64_t i = 0; i < count; ++i) set(array[i], magnitude * random()), exact[i] = value_of(array[i]);
  }
  const X* data() const { return array.data(); }
  double operator[](int64_t i) const { return exact[i]; }
};

template <class X>
void compare(const Guarded<X>& actual, const Numbers& expected, double rounding, const char* what, int64_t rows,
             int64_t columns) {
  double largest = 0, size = 1;
  for (double e : expected) size = std::fmax(size, std::fabs(e));
  for (int64_t i = 0; i < actual.size(); ++i) {
    const double error = std::fabs(value_of(actual[i]) - expected[i]);
    if (!(error <= largest)) largest = error;
  }
  CHECK(largest <= rounding * size, "%s of %d rows, %d columns: off by %g", what, int(rows), int(columns), largest);
}

// `kind` 0: no branch, 1: a branch, 2: a branch and its bias.
template <class D>
void layer_norm_of(int64_t rows, int64_t n, int kind) {
  using S = typename D::Wide;
  using P = typename D::Narrow;
  using T = typename D::T;
  const double eps = 1e-5;
  const Input<S> x(rows * n, 1), weight(n, 2), bias(n, 3), branch_bias(n, 4);
  const Input<P> branch(rows * n, 5), d_z(rows * n, 6);
  const Input<S> d_y(rows * n, 7);
  const Guarded<S> y(kind ? rows * n : 0);
  const Guarded<P> z(rows * n);
  const Guarded<T> mean(rows), rstd(rows);
  layer_norm_forward<D>({rows, n, x.data(), kind ? branch.data() : nullptr, kind == 2 ? branch_bias.data() : nullptr,
                         weight.data(), bias.data(), eps, y.data(), z.data(), mean.data(), rstd.data()},
                        backwards);
  const S* stream = kind ? y.data() : x.data();
  Numbers sums(rows * n), normed(rows * n), d_x(rows * n), d_weight(n), d_bias(n), d_branch_bias(n), means, rstds;
  for (int64_t r = 0; r < rows; ++r) {
    double mu = 0, square = 0, g_mean = 0, g_slope = 0;
    for (int64_t i = r * n; i < (r + 1) * n; ++i) {
      sums[i] = x[i] + (kind ? branch[i] : 0) + (kind == 2 ? branch_bias[i - r * n] : 0);
      mu += value_of(stream[i]) / n;  // statistics are of the stream as it is stored
    }
    for (int64_t i = r * n; i < (r + 1) * n; ++i) square += std::pow(value_of(stream[i]) - mu, 2) / n;
    const double scale = 1 / std::sqrt(square + eps);
    const auto xhat = [&](int64_t i) { return (value_of(stream[i]) - mu) * scale; };
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = r * n + i;
      normed[at] = xhat(at) * weight[i] + bias[i];
      g_mean += d_z[at] * weight[i] / n;
      g_slope += d_z[at] * weight[i] * xhat(at) / n;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = r * n + i;
      d_x[at] = scale * (d_z[at] * weight[i] - g_mean - xhat(at) * g_slope) + d_y[at];
      d_weight[i] += d_z[at] * xhat(at);
      d_bias[i] += d_z[at];
      d_branch_bias[i] += d_x[at];
    }
    means.push_back(mu);
    rstds.push_back(scale);
  }
  compare(y, sums, kRounding<S>, "y", rows, n);
  compare(z, normed, kRounding<P>, "z", rows, n);
  compare(mean, means, kRounding<T>, "mean", rows, n);
  compare(rstd, rstds, kRounding<T>, "rstd", rows, n);

  const Guarded<S> dx(rows * n), dweight(n), dbias(n), dbranch_bias(kind == 2 ? n : 0);
  const Guarded<P> dbranch(rows * n);
  layer_norm_backward<D>({rows, n, d_y.data(), d_z.data(), stream, mean.data(), rstd.data(), weight.data(), dx.data(),
                          dbranch.data(), dweight.data(), dbias.data(), kind == 2 ? dbranch_bias.data() : nullptr},
                         backwards);
  compare(dx, d_x, kRounding<S>, "d_x", rows, n);
  compare(dbranch, d_x, kRounding<P>, "d_branch", rows, n);
  compare(dweight, d_weight, kRounding<S>, "d_weight", rows, n);
  compare(dbias, d_bias, kRounding<S>, "d_bias", rows, n);
  compare(dbranch_bias, d_branch_bias, 2 * kRounding<S>, "d_branch_bias", rows, n);
}

template <class D>
void geglu_of(int64_t rows, int64_t n, int biased) {
  using B = typename D::Wide;
  using P = typename D::Narrow;
  const Input<P> h(rows * 2 * n, 1, 3), d_u(rows * n, 2);
  const Input<B> bias(2 * n, 3);
  const B* bias_data = biased ? bias.data() : nullptr;
  const Guarded<P> u(rows * n), again(rows * n), dh(rows * 2 * n);
  const Guarded<B> dbias(biased ? 2 * n : 0);
  geglu_forward<D>({rows, n, h.data(), bias_data, u.data()}, backwards);
  geglu_backward<D>(
      {rows, n, d_u.data(), h.data(), bias_data, again.data(), dh.data(), biased ? dbias.data() : nullptr}, backwards);
  Numbers out(rows * n), d_h(rows * 2 * n), d_bias(2 * n);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = r * 2 * n + i;
      const double value = h[at] + (biased ? bias[i] : 0), gate = h[at + n] + (biased ? bias[n + i] : 0);
      const double phi = std::erfc(-gate / std::sqrt(2.0)) / 2,
                   density = std::exp(-gate * gate / 2) * 0.3989422804014327;
      out[r * n + i] = value * gate * phi;
      d_bias[i] += d_h[at] = d_u[r * n + i] * gate * phi;
      d_bias[n + i] += d_h[at + n] = d_u[r * n + i] * value * (phi + gate * density);
    }
  compare(u, out, kRounding<P>, "u", rows, n);
  compare(again, out, kRounding<P>, "u of the backward", rows, n);
  compare(dh, d_h, kRounding<P>, "d_h", rows, n);
  compare(dbias, d_bias, kRounding<B>, "d_bias", rows, n);
}

// of(rows, columns, kind) for one row and some, every remainder of every vector's length, and long rows.
template <class Of>
void sizes(int kinds, Of of) {
  for (int64_t rows : {1, 3, 40})
    for (int64_t n : {1,  2,  3,  4,  5,  7,  8,  9,  15, 16, 17, 18, 19, 20,  21,  22,  23,
                      24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 63, 64, 65, 127, 130, 1100})
      for (int kind = 0; kind < kinds && (rows < 40 || n % 10 == 0); ++kind) of(rows, n, kind);
}

void layer_norm() {
#define PF_SIZES(D) sizes(3, layer_norm_of<D>);
  PF_FOR_DTYPES(PF_SIZES)
#undef PF_SIZES
}

void geglu() {
#define PF_SIZES(D) sizes(2, geglu_of<D>);
  PF_FOR_DTYPES(PF_SIZES)
}

}  // namespace

extern const Case rows_cases[] = {{"layer_norm", layer_norm}, {"geglu", geglu}, {nullptr, nullptr}};
