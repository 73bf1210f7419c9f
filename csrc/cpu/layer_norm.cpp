// torch operators perceiver_fast::layer_norm_{forward,backward} for CPU tensors, on torch's stable ABI: y = x + branch
// + branch_bias and its LayerNorm z over the last dimension; csrc/core computes. Shapes and dtypes are checked here.
// Threads are torch's. Operands that are not dense are copied.
#include "../core/layer_norm.h"

#include <tuple>

#include "dtypes.h"

namespace perceiver_fast {
namespace {

constexpr Check check{"layer_norm"};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& branch,
                                                   const std::optional<Tensor>& branch_bias, const Tensor& weight,
                                                   const Tensor& bias, double eps, ScalarType out_dtype) {
  check.tensor("x", x);
  check.eps(eps);
  const Rows rows(check, "x", x);
  const ScalarType dtype = x.scalar_type(), statistics = compute_dtype(dtype);
  with_dtypes(check.op, dtype, out_dtype, [](auto) {});
  const int64_t D = rows.columns;
  const Shape &shape = rows.shape, &outer = rows.outer, vector{D};
  STD_TORCH_CHECK(branch || !branch_bias, "layer_norm: expected branch_bias with a branch, got it alone");
  const auto joining = check.dense("branch", branch, out_dtype, shape, "like x");
  const auto joining_bias = check.dense("branch_bias", branch_bias, dtype, vector, "[D]");
  const Tensor scale = check.dense("weight", weight, dtype, vector, "[D]");
  const Tensor shift = check.dense("bias", bias, dtype, vector, "[D]");
  const Tensor stream = dense(x);
  Tensor y = torch::stable::new_empty(x, branch ? shape : Shape{0});
  Tensor z = torch::stable::new_empty(x, shape, out_dtype);
  Tensor mean = torch::stable::new_empty(x, outer, statistics), rstd = torch::stable::new_empty(x, outer, statistics);
  with_dtypes(check.op, dtype, out_dtype, [&](auto dtypes) {
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
  check.tensor("y", y);
  check.tensor("d_z", d_z);
  const Rows rows(check, "y", y);
  const ScalarType dtype = y.scalar_type(), out_dtype = d_z.scalar_type(), statistics = compute_dtype(dtype);
  with_dtypes(check.op, dtype, out_dtype, [](auto) {});
  const int64_t D = rows.columns;
  const Shape &shape = rows.shape, vector{D}, none{0};
  const Tensor grad = check.dense("d_z", d_z, out_dtype, shape, "like y");
  const auto grad_stream = check.dense("d_y", d_y, dtype, shape, "like y");
  const Tensor middle = check.dense("mean", mean, statistics, rows.outer, "of y's rows");
  const Tensor spread = check.dense("rstd", rstd, statistics, rows.outer, "of y's rows");
  const Tensor scale = check.dense("weight", weight, dtype, vector, "[D]");
  const Tensor stream = dense(y);
  Tensor d_x = torch::stable::new_empty(y, shape);
  Tensor d_branch = torch::stable::new_empty(d_z, out_dtype == dtype ? none : shape);
  Tensor d_weight = torch::stable::new_empty(weight, vector), d_bias = torch::stable::new_empty(weight, vector);
  Tensor d_branch_bias = torch::stable::new_empty(weight, branch_bias ? vector : none);
  with_dtypes(check.op, dtype, out_dtype, [&](auto dtypes) {
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
