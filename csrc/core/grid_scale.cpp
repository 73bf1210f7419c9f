// LayerNorm's scale of every token of a grid, r = 1 / sqrt(var + eps), from raw channels and per-axis statistics:
//
//   mu_m = (sum_f x_mf + sum_a C_a mean_a) / C
//   r_m  = 1 / sqrt((sum_f (x_mf - mu_m)^2 + sum_a (square_a + C_a (mean_a - mu_m)^2)) / C + eps)
//
// Rows of tokens (all axes but the last) are shared out to the threads; the outer axes' terms are summed once a row.
// Memory: one number an axis for a thread.
#include "grid_scale.h"

#include <cmath>

namespace perceiver_fast {

namespace {

// The sum of term(f) over the features, in blocks so that no sum is long: the error of a sum grows with its length.
template <class Term>
auto sum_features(int64_t features, const Term& term) {
  constexpr int64_t kBlock = 32;
  decltype(term(0)) total = 0;
  for (int64_t begin = 0; begin < features; begin += kBlock) {
    decltype(term(0)) part = 0;
    for (int64_t f = begin; f < features && f < begin + kBlock; ++f) part += term(f);
    total += part;
  }
  return total;
}

// Variances of one row of tokens, [columns]. `means` holds the outer axes' means and has room for the inner one.
// FS > 0 fixes the number of features.
template <class T, int FS>
void row_variance(const T* feat, int64_t columns, int64_t features, T* means, const T* widths, int64_t axes,
                  T outer_sum, T outer_square, const T* inner_mean, const T* inner_square, T per_channel, T* variance) {
  const int64_t F = FS > 0 ? FS : features;
  for (int64_t j = 0; j < columns; ++j, feat += F) {
    means[axes - 1] = inner_mean[j];
    T mu = (outer_sum + widths[axes - 1] * inner_mean[j]) * per_channel;
    mu += sum_features(F, [=](int64_t f) { return feat[f] * per_channel; });  // a sum of large ones could overflow
    T square = outer_square + inner_square[j];
    for (int64_t a = 0; a < axes; ++a) square += widths[a] * ((means[a] - mu) * (means[a] - mu));
    square += sum_features(F, [=](int64_t f) { return (feat[f] - mu) * (feat[f] - mu); });
    variance[j] = square * per_channel;
  }
}

}  // namespace

template <class T>
void grid_scale_forward(const T* feat, int64_t batch, const std::vector<int64_t>& sizes, int64_t features,
                        const T* axis_mean, const T* axis_square, const std::vector<int64_t>& axis_channels, double eps,
                        T* scale,
                        const Parallel& parallel) {
  const int64_t axes = sizes.size(), columns = sizes.back();
  int64_t rows = 1, inner = 0;  // `inner`: where the last axis starts in axis_mean and axis_square
  for (int64_t a = 0; a + 1 < axes; ++a) {
    rows *= sizes[a];
    inner += sizes[a];
  }
  const std::vector<T> widths(axis_channels.begin(), axis_channels.end());
  int64_t channels = features;
  for (int64_t width : axis_channels) channels += width;
  const T per_channel = T(1) / T(channels);
  const auto variance = features == 1 ? row_variance<T, 1> : features == 3 ? row_variance<T, 3> : row_variance<T, 0>;

  parallel.run(batch * rows, [&](int64_t begin, int64_t end) {
    std::vector<T> means(axes);
    for (int64_t line = begin; line < end; ++line) {
      T outer_sum = 0, outer_square = 0;
      int64_t row = line % rows, start = inner;
      for (int64_t a = axes - 2; a >= 0; --a) {
        start -= sizes[a];
        means[a] = axis_mean[start + row % sizes[a]];
        outer_sum += widths[a] * means[a];
        outer_square += axis_square[start + row % sizes[a]];
        row /= sizes[a];
      }
      T* out = scale + line * columns;
      variance(feat + line * columns * features, columns, features, means.data(), widths.data(), axes, outer_sum,
               outer_square, axis_mean + inner, axis_square + inner, per_channel, out);
      for (int64_t j = 0; j < columns; ++j) out[j] = T(1) / std::sqrt(out[j] + T(eps));  // a loop compilers vectorise
    }
  });
}

template void grid_scale_forward<float>(const float*, int64_t, const std::vector<int64_t>&, int64_t, const float*,
                                        const float*, const std::vector<int64_t>&, double, float*, const Parallel&);
template void grid_scale_forward<double>(const double*, int64_t, const std::vector<int64_t>&, int64_t, const double*,
                                         const double*, const std::vector<int64_t>&, double, double*,
                                         const Parallel&);

}  // namespace perceiver_fast
