// torch operators perceiver_fast::geglu_{forward,backward} for CPU tensors, on torch's stable ABI: u = value * gate *
// Phi(gate) with [value, gate] = h + bias, h [.., 2 F] and bias [2 F]; csrc/core computes. Shapes and dtypes are
// checked here. Threads are torch's. Operands that are not dense are copied.
#include "../core/geglu.h"

#include <tuple>

#include "dtypes.h"

namespace perceiver_fast {
namespace {

constexpr Check check{"geglu"};

struct Inputs {
  ScalarType dtype, bias_dtype;
  Rows rows;
  Shape u_shape;
  Tensor h;
  std::optional<Tensor> bias;

  Inputs(const Tensor& h_, const std::optional<Tensor>& bias_)
      : dtype(dtype_of("h", h_)), bias_dtype(bias_ ? dtype_of("bias", *bias_) : dtype), rows(check, "h", h_) {
    STD_TORCH_CHECK(rows.columns % 2 == 0, "geglu: expected h [.., 2 F], got shape ", text_of(rows.shape));
    with_dtypes(check.op, bias_dtype, dtype, [](auto) {});
    u_shape = with_last(rows.shape, rows.columns / 2);
    bias = check.dense("bias", bias_, bias_dtype, {rows.columns}, "[2 F]");
    h = dense(h_);
  }

  static ScalarType dtype_of(const char* name, const Tensor& t) {
    check.tensor(name, t);
    return t.scalar_type();
  }
};

Tensor forward(const Tensor& h, const std::optional<Tensor>& bias) {
  const Inputs in(h, bias);
  Tensor u = torch::stable::new_empty(h, in.u_shape);
  with_dtypes(check.op, in.bias_dtype, in.dtype, [&](auto dtypes) {
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
  const Tensor grad = check.dense("d_u", d_u, in.dtype, in.u_shape, "[.., F]");
  Tensor u = torch::stable::new_empty(h, in.u_shape), d_h = torch::stable::new_empty(h, in.rows.shape);
  const std::vector<int64_t> width{bias ? in.rows.columns : 0};
  Tensor d_bias = torch::stable::new_empty(bias ? *bias : h, width);
  with_dtypes(check.op, in.bias_dtype, in.dtype, [&](auto dtypes) {
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
