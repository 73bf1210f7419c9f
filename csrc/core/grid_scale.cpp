#include "grid_scale.h"

#include <cmath>

namespace perceiver_fast {

template <class T>
void grid_scale_forward(const T* feat, int64_t batch, const std::vector<int64_t>& sizes, int64_t features,
                        const T* axis_mean, const T* axis_square, int64_t axis_channels, double eps, T* scale,
                        const Parallel& parallel) {
  const int64_t axes = sizes.size(), columns = sizes.back();
  int64_t rows = 1, inner = 0;  // `inner`: where the last axis starts in axis_mean and axis_square
  for (int64_t a = 0; a + 1 < axes; ++a) {
    rows *= sizes[a];
    inner += sizes[a];
  }
  const T width = T(axis_channels), per_channel = T(1) / T(features + axes * axis_channels);

  parallel.run(batch * rows, [&](int64_t begin, int64_t end) {
    std::vector<T> means(axes);
    for (int64_t line = begin; line < end; ++line) {
      T outer_mean = 0, outer_square = 0;
      int64_t row = line % rows, start = inner;
      for (int64_t a = axes - 2; a >= 0; --a) {
        start -= sizes[a];
        means[a] = axis_mean[start + row % sizes[a]];
        outer_mean += means[a];
        outer_square += axis_square[start + row % sizes[a]];
        row /= sizes[a];
      }
      for (int64_t j = 0; j < columns; ++j) {
        const T* x = feat + (line * columns + j) * features;
        means[axes - 1] = axis_mean[inner + j];
        T sum = width * (outer_mean + means[axes - 1]);
        for (int64_t f = 0; f < features; ++f) sum += x[f];
        const T mu = sum * per_channel;
        T spread = 0, square = outer_square + axis_square[inner + j];
        for (int64_t a = 0; a < axes; ++a) spread += (means[a] - mu) * (means[a] - mu);
        for (int64_t f = 0; f < features; ++f) square += (x[f] - mu) * (x[f] - mu);
        scale[line * columns + j] = T(1) / std::sqrt((square + width * spread) * per_channel + T(eps));
      }
    }
  });
}

template void grid_scale_forward<float>(const float*, int64_t, const std::vector<int64_t>&, int64_t, const float*,
                                        const float*, int64_t, double, float*, const Parallel&);
template void grid_scale_forward<double>(const double*, int64_t, const std::vector<int64_t>&, int64_t, const double*,
                                         const double*, int64_t, double, double*, const Parallel&);

}  // namespace perceiver_fast
