// torch operators perceiver_fast::geglu_{forward,backward} for CPU tensors, on torch's stable ABI: u = value * gate *
// Phi(gate) with [value, gate] = h + bias, h [.., 2 F] and bias [2 F]; csrc/core computes. Shapes and dtypes are
// checked here. Threads are torch's. Operands that are not dense are copied.
#include "../core/geglu.h"

#include <tuple>

#include "dtypes.h"

namespace perceiver_fast {
namespace {

constexpr const char* kOp = "geglu";

struct Inputs {
  Rows rows;
  ScalarType dtype, bias_dtype;
  Tensor h;
  std::optional<Tensor> bias;
  std::vector<int64_t> u_shape;

  Inputs(const Tensor& h_, const std::optional<Tensor>& bias_)
      : rows(kOp, h_),
        dtype(h_.scalar_type()),
        bias_dtype(bias_ ? bias_->scalar_type() : dtype),
        h(torch::stable::contiguous(h_)),
        bias(dense(kOp, "bias", bias_, rows.columns, bias_dtype)),
        u_shape(sizes_of(h_)) {
    STD_TORCH_CHECK(rows.columns % 2 == 0, "geglu: expected h [.., 2 F], got ", rows.columns, " columns");
    u_shape.back() /= 2;
  }
};

Tensor forward(const Tensor& h, const std::optional<Tensor>& bias) {
  const Inputs in(h, bias);
  Tensor u = torch::stable::new_empty(h, in.u_shape);
  with_dtypes(kOp, in.bias_dtype, in.dtype, [&](auto dtypes) {
    using D = decltype(dtypes);
    using B = typename D::Wide;
    using P = typename D::Narrow;
    geglu_forward<D>({in.rows.count, in.u_shape.back(), data<P>(in.h), data<B>(in.bias), data<P>(u)},
                     torch_parallel());
  });
  return u;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_u, const Tensor& h, const std::optional<Tensor>& bias) {
  const Inputs in(h, bias);
  const Tensor grad = dense(kOp, "d_u", d_u, in.rows.count * in.u_shape.back(), in.dtype);
  Tensor u = torch::stable::new_empty(h, in.u_shape), d_h = torch::stable::new_empty(h, sizes_of(h));
  const std::vector<int64_t> width{bias ? in.rows.columns : 0};
  Tensor d_bias = torch::stable::new_empty(bias ? *bias : h, width);
  with_dtypes(kOp, in.bias_dtype, in.dtype, [&](auto dtypes) {
    using D = decltype(dtypes);
    using B = typename D::Wide;
    using P = typename D::Narrow;
    geglu_backward<D>({in.rows.count, in.u_shape.back(), data<P>(grad), data<P>(in.h), data<B>(in.bias), data<P>(u),
                       data<P>(d_h), bias ? data<B>(d_bias) : nullptr},
                      torch_parallel());
  });
  return {u, d_h, d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CPU, m) {
  m.impl("geglu_forward", TORCH_BOX(&forward));
  m.impl("geglu_backward", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
