// torch operators perceiver_fast::layer_norm_{forward,backward} for CPU tensors, on torch's stable ABI: y = x + branch
// + branch_bias and its LayerNorm z over the last dimension; csrc/core computes. Shapes and dtypes are checked here.
// Threads are torch's. Operands that are not dense are copied.
#include "../core/layer_norm.h"

#include <tuple>

#include "dtypes.h"

namespace perceiver_fast {
namespace {

constexpr const char* kOp = "layer_norm";

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& branch,
                                                   const std::optional<Tensor>& branch_bias, const Tensor& weight,
                                                   const Tensor& bias, double eps, ScalarType out_dtype) {
  const Rows rows(kOp, x);
  const ScalarType dtype = x.scalar_type(), statistics = compute_dtype(dtype);
  const int64_t D = rows.columns;
  STD_TORCH_CHECK(branch || !branch_bias, "layer_norm: expected branch_bias with a branch, got it alone");
  const Tensor stream = torch::stable::contiguous(x);
  const auto joining = dense(kOp, "branch", branch, x.numel(), out_dtype);
  const auto joining_bias = dense(kOp, "branch_bias", branch_bias, D, dtype);
  const Tensor scale = dense(kOp, "weight", weight, D, dtype), shift = dense(kOp, "bias", bias, D, dtype);
  const std::vector<int64_t> shape = sizes_of(x), outer(shape.begin(), shape.end() - 1);
  Tensor y = torch::stable::new_empty(x, branch ? shape : std::vector<int64_t>{0});
  Tensor z = torch::stable::new_empty(x, shape, out_dtype);
  Tensor mean = torch::stable::new_empty(x, outer, statistics), rstd = torch::stable::new_empty(x, outer, statistics);
  with_dtypes(kOp, dtype, out_dtype, [&](auto dtypes) {
    using D_ = decltype(dtypes);
    using S = typename D_::Wide;
    using P = typename D_::Narrow;
    using T = typename D_::T;
    layer_norm_forward<D_>({rows.count, D, data<S>(stream), data<P>(joining), data<S>(joining_bias), data<S>(scale),
                            data<S>(shift), eps, data<S>(y), data<P>(z), data<T>(mean), data<T>(rstd)},
                           torch_parallel());
  });
  return {y, z, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const std::optional<Tensor>& d_y, const Tensor& d_z,
                                                            const Tensor& y, const Tensor& mean, const Tensor& rstd,
                                                            const Tensor& weight, bool branch_bias) {
  const Rows rows(kOp, y);
  const ScalarType dtype = y.scalar_type(), out_dtype = d_z.scalar_type(), statistics = compute_dtype(dtype);
  const int64_t D = rows.columns;
  const Tensor stream = torch::stable::contiguous(y), grad = dense(kOp, "d_z", d_z, y.numel(), out_dtype);
  const auto grad_stream = dense(kOp, "d_y", d_y, y.numel(), dtype);
  const Tensor middle = dense(kOp, "mean", mean, rows.count, statistics);
  const Tensor spread = dense(kOp, "rstd", rstd, rows.count, statistics);
  const Tensor scale = dense(kOp, "weight", weight, D, dtype);
  const auto shape = sizes_of(y);
  const std::vector<int64_t> vector{D}, none{0};
  Tensor d_x = torch::stable::new_empty(y, shape);
  Tensor d_branch = torch::stable::new_empty(d_z, out_dtype == dtype ? none : shape);
  Tensor d_weight = torch::stable::new_empty(weight, vector), d_bias = torch::stable::new_empty(weight, vector);
  Tensor d_branch_bias = torch::stable::new_empty(weight, branch_bias ? vector : none);
  with_dtypes(kOp, dtype, out_dtype, [&](auto dtypes) {
    using D_ = decltype(dtypes);
    using S = typename D_::Wide;
    using P = typename D_::Narrow;
    using T = typename D_::T;
    layer_norm_backward<D_>({rows.count, D, data<S>(grad_stream), data<P>(grad), data<S>(stream), data<T>(middle),
                             data<T>(spread), data<S>(scale), data<S>(d_x),
                             out_dtype == dtype ? nullptr : data<P>(d_branch), data<S>(d_weight), data<S>(d_bias),
                             branch_bias ? data<S>(d_branch_bias) : nullptr},
                            torch_parallel());
  });
  return {d_x, d_branch, d_weight, d_bias, d_branch_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&forward));
  m.impl("layer_norm_backward", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
