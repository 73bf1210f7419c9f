// torch operator perceiver_fast::grid_scale_forward for CPU tensors, on torch's stable ABI: LayerNorm's scale of every
// token of a grid, [B, *sizes], from feat [B, *sizes, F] and statistics of the axes' codes, [sum(sizes)]; csrc/core
// computes. Shapes and dtypes are checked here. Threads are torch's. Operands that are not dense are copied.
#include "../core/grid_scale.h"

#include "torch_stable.h"

namespace perceiver_fast {
namespace {

Tensor forward(const Tensor& feat, const Tensor& axis_mean, const Tensor& axis_square,
               std::vector<int64_t> axis_channels, double eps) {
  STD_TORCH_CHECK(feat.dim() >= 3, "grid_scale: expected feat [B, *sizes, F], got ", feat.dim(), " dimensions");
  const Tensor x = torch::stable::contiguous(feat), mean = torch::stable::contiguous(axis_mean);
  const Tensor square = torch::stable::contiguous(axis_square);
  std::vector<int64_t> shape = sizes_of(feat);
  const int64_t features = shape.back();
  shape.pop_back();
  const std::vector<int64_t> sizes(shape.begin() + 1, shape.end());
  STD_TORCH_CHECK(axis_channels.size() == sizes.size(), "grid_scale: expected axis_channels of ", sizes.size(),
                  " axes, got ", axis_channels.size());
  int64_t positions = 0;
  for (int64_t size : sizes) positions += size;
  STD_TORCH_CHECK(mean.numel() == positions && square.numel() == positions,
                  "grid_scale: expected axis_mean and axis_square of sum(sizes) = ", positions, " values");
  STD_TORCH_CHECK(mean.scalar_type() == feat.scalar_type() && square.scalar_type() == feat.scalar_type(),
                  "grid_scale: expected feat, axis_mean and axis_square of one dtype");
  STD_TORCH_CHECK(feat.scalar_type() == ScalarType::Float || feat.scalar_type() == ScalarType::Double,
                  "grid_scale: expected float32 or float64");
  Tensor scale = torch::stable::new_empty(feat, shape);
  with_type(feat, [&](auto zero) {
    using T = decltype(zero);
    grid_scale_forward<T>(data<const T>(x), shape[0], sizes, features, data<const T>(mean), data<const T>(square),
                          axis_channels, eps, data<T>(scale), torch_parallel());
  });
  return scale;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CPU, m) { m.impl("grid_scale_forward", TORCH_BOX(&forward)); }

}  // namespace perceiver_fast
