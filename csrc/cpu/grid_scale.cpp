// torch operator perceiver_fast::grid_scale_forward for CPU tensors, on torch's stable ABI: LayerNorm's scale of every
// token of a grid, [B, *sizes], from feat [B, *sizes, F] and statistics of the axes' codes, [sum(sizes)]; csrc/core
// computes. Shapes and dtypes are checked here. Threads are torch's. Operands that are not dense are copied.
#include "../core/grid_scale.h"

#include "checks.h"

namespace perceiver_fast {
namespace {

constexpr Check check{"grid_scale"};

Tensor forward(const Tensor& feat, const Tensor& axis_mean, const Tensor& axis_square,
               std::vector<int64_t> axis_channels, double eps) {
  const ScalarType dtype = check.floating("feat", feat);
  STD_TORCH_CHECK(feat.dim() >= 3, "grid_scale: expected feat [B, *sizes, F], got shape ", text_of(sizes_of(feat)));
  check.eps(eps);
  Shape shape = sizes_of(feat);
  const int64_t features = shape.back();
  shape.pop_back();
  const Shape sizes(shape.begin() + 1, shape.end());
  STD_TORCH_CHECK(axis_channels.size() == sizes.size(), "grid_scale: expected axis_channels of ", sizes.size(),
                  " axes, got ", axis_channels.size());
  for (int64_t channels : axis_channels)
    STD_TORCH_CHECK(channels >= 0 && channels < int64_t(1) << 31,
                    "grid_scale: expected axis_channels from 0 to 2^31 - 1, got ", channels);
  const Shape positions{check.sum("positions", sizes)};
  check.product("tokens", shape);
  const Tensor mean = check.dense("axis_mean", axis_mean, dtype, positions, "[sum(sizes)]");
  const Tensor square = check.dense("axis_square", axis_square, dtype, positions, "[sum(sizes)]");
  const Tensor x = dense(feat);
  Tensor scale = torch::stable::new_empty(feat, shape);
  if (scale.numel() == 0) return scale;
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
