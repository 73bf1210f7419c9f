// torch operators perceiver_fast::layer_norm_linear_{forward,backward} for CPU tensors, on torch's stable ABI: LayerNorm of
// rows [n, C] times weight^T [C, D]; csrc/core computes. Shapes and dtypes are checked here. Threads are torch's. Operands
// that are not dense are copied.
#include "../core/layer_norm_linear.h"

#include <tuple>

#include "checks.h"

namespace perceiver_fast {
namespace {

constexpr Check check{"layer_norm_linear"};

// Dense inputs, alive as long as the raw pointers taken from them.
struct Inputs {
  int64_t rows, channels, out_channels;
  double eps;
  Tensor x, gain, shift, weight;

  Inputs(const Tensor& x_, const Tensor& gain_, const Tensor& shift_, const Tensor& weight_, double eps_) : eps(eps_) {
    const ScalarType dtype = check.floating("x", x_);
    check.rank("x", x_, 2, "[n, C]");
    check.rank("weight", weight_, 2, "[D, C]");
    rows = x_.size(0), channels = x_.size(1), out_channels = weight_.size(0);
    STD_TORCH_CHECK(x_.numel() > 0 && weight_.numel() > 0,
                    "layer_norm_linear: expected rows and a weight, got shapes ", text_of(sizes_of(x_)), " and ",
                    text_of(sizes_of(weight_)));
    STD_TORCH_CHECK(std::isfinite(eps) && eps > 0, "layer_norm_linear: expected eps above 0, got ", eps);
    x = dense(x_);
    gain = check.dense("gain", gain_, dtype, {channels}, "[C]");
    shift = check.dense("shift", shift_, dtype, {channels}, "[C]");
    weight = check.dense("weight", weight_, dtype, {out_channels, channels}, "[D, C]");
  }

  template <class T>
  LayerNormLinear<T> view() const {
    return {rows, channels, out_channels, eps, data<const T>(x), data<const T>(gain), data<const T>(shift),
            data<const T>(weight)};
  }
};

Tensor forward(const Tensor& x, const Tensor& gain, const Tensor& shift, const Tensor& weight, double eps) {
  const Inputs in(x, gain, shift, weight, eps);
  Tensor out = torch::stable::new_empty(x, {in.rows, in.out_channels});
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    layer_norm_linear_forward<T>(in.view<T>(), data<T>(out), torch_parallel());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& d_out, const Tensor& x, const Tensor& gain,
                                                    const Tensor& shift, const Tensor& weight, double eps, bool to_x) {
  const Inputs in(x, gain, shift, weight, eps);
  const Tensor grad = check.dense("d_out", d_out, x.scalar_type(), {in.rows, in.out_channels}, "[n, D]");
  Tensor d_x = torch::stable::new_empty(x, {to_x ? in.rows : 0, in.channels});
  Tensor d_gain = torch::stable::new_empty(x, {in.channels}), d_shift = torch::stable::new_empty(x, {in.channels});
  Tensor d_weight = torch::stable::new_empty(x, {in.out_channels, in.channels});
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    layer_norm_linear_backward<T>(in.view<T>(), data<const T>(grad), to_x ? data<T>(d_x) : nullptr, data<T>(d_gain),
                                  data<T>(d_shift), data<T>(d_weight), torch_parallel());
  });
  return {d_x, d_gain, d_shift, d_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CPU, m) {
  m.impl("layer_norm_linear_forward", TORCH_BOX(&forward));
  m.impl("layer_norm_linear_backward", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
