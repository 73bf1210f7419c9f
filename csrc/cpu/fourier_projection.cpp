// torch operators perceiver_fast::fourier_projection_{forward,backward} for CPU tensors, on torch's stable ABI: out = r
// (z W) + bias of Fourier codes z with positions [Bc, M, A] and features [B, M, F]; csrc/core computes.
// perceiver_fast/ops/fourier_projection.py defines the schemas. Shapes and dtypes are checked here. Threads are
// torch's. Operands that are not dense are copied.
#include "../core/fourier_projection.h"

#include <tuple>

#include "checks.h"

namespace perceiver_fast {
namespace {

constexpr Check check{"fourier_projection"};

// Dense inputs, alive as long as the raw pointers taken from them.
struct Inputs {
  std::optional<Tensor> feat;
  Tensor coords, frequencies, weight;
  int64_t batch, tokens, features;

  Inputs(const std::optional<Tensor>& feat_, const Tensor& coords_, const Tensor& frequencies_, const Tensor& weight_) {
    const ScalarType dtype = check.floating("weight", weight_);
    check.dtype("feat", feat_, dtype);
    check.dtype("coords", coords_, ScalarType::Double);
    check.dtype("frequencies", frequencies_, ScalarType::Double);
    check.rank("coords", coords_, 3, "[Bc, M, A]");
    check.rank("frequencies", frequencies_, 2, "[A, K]");
    check.rank("weight", weight_, 2, "[C, D]");
    const int64_t axes = coords_.size(2), bands = frequencies_.size(1);
    batch = coords_.size(0);
    tokens = coords_.size(1);
    features = 0;
    if (feat_) {
      check.rank("feat", *feat_, 3, "[B, M, F]");
      features = feat_->size(2);
      if (batch == 1) batch = feat_->size(0);
      check.shape("feat", *feat_, {batch, tokens, features}, "[B, M, F] with coords' B and M");
    }
    STD_TORCH_CHECK(axes > 0 || features > 0,
                    "fourier_projection: expected at least one axis in coords, or one channel in feat, got coords of ",
                    text_of(sizes_of(coords_)));
    STD_TORCH_CHECK(bands < int64_t(1) << 31, "fourier_projection: expected fewer than 2^31 bands, got ", bands);
    check.product("tokens", {batch, tokens});
    check.shape("frequencies", frequencies_, {axes, bands}, "[A, K]");
    const int64_t codes = check.product("channels", {axes, 2 * bands + 1});
    check.shape("weight", weight_, {check.sum("channels", {features, codes}), weight_.size(1)}, "[F + A (2 K + 1), D]");
    if (feat_) feat = dense(*feat_);
    coords = dense(coords_);
    frequencies = dense(frequencies_);
    weight = dense(weight_);
  }

  template <class T>
  FourierProjectionInput<T> view() const {
    return {batch,
            coords.size(0),
            tokens,
            features,
            coords.size(2),
            frequencies.size(1),
            weight.size(1),
            features > 0 ? data<const T>(*feat) : nullptr,
            data<const double>(coords),
            data<const double>(frequencies),
            data<const T>(weight)};
  }
};

std::tuple<Tensor, Tensor> forward(const std::optional<Tensor>& feat, const Tensor& coords, const Tensor& frequencies,
                                   const Tensor& weight, const std::optional<Tensor>& bias, std::optional<double> eps) {
  const Inputs inputs(feat, coords, frequencies, weight);
  const int64_t outputs = weight.size(1);
  if (eps) check.eps(*eps);
  const auto offset = check.dense("bias", bias, weight.scalar_type(), {outputs}, "[D]");
  Tensor out = torch::stable::new_empty(weight, {inputs.batch, inputs.tokens, outputs});
  Tensor scale = torch::stable::new_empty(
      weight, eps ? Shape{inputs.batch, inputs.tokens} : Shape{0});
  with_type(weight, [&](auto zero) {
    using T = decltype(zero);
    fourier_projection_forward<T>(inputs.view<T>(), data<const T>(offset), eps.value_or(0), data<T>(out),
                                  eps ? data<T>(scale) : nullptr, torch_parallel());
  });
  return {out, scale};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_out, const std::optional<Tensor>& feat,
                                            const Tensor& coords, const Tensor& frequencies, const Tensor& weight,
                                            const Tensor& scale, std::optional<double> eps, bool token_grads) {
  const Inputs inputs(feat, coords, frequencies, weight);
  if (eps) check.eps(*eps);
  const ScalarType dtype = weight.scalar_type();
  const Shape rows{inputs.batch, inputs.tokens}, outputs{inputs.batch, inputs.tokens, weight.size(1)};
  const Tensor grad = check.dense("d_out", d_out, dtype, outputs, "[B, M, D]");
  check.tensor("scale", scale);
  const Tensor r = eps ? check.dense("scale", scale, dtype, rows, "[B, M]") : scale;
  const bool feat_grads = token_grads && feat.has_value();
  Tensor dweight = torch::stable::new_empty(weight, sizes_of(weight));
  Tensor dfeat = torch::stable::new_empty(weight, feat_grads ? sizes_of(*feat) : Shape{0});
  Tensor dcoords = torch::stable::new_empty(coords, token_grads ? sizes_of(coords) : Shape{0});
  // Without axes there are no positions to write to, and yet gradients of the tokens.
  double none;
  double* d_coords = dcoords.numel() > 0 ? data<double>(dcoords) : &none;
  with_type(weight, [&](auto zero) {
    using T = decltype(zero);
    fourier_projection_backward<T>(inputs.view<T>(), eps ? data<const T>(r) : nullptr, data<const T>(grad),
                                   data<T>(dweight), data<T>(dfeat), token_grads ? d_coords : nullptr,
                                   torch_parallel());
  });
  return {dweight, dfeat, dcoords};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CPU, m) {
  m.impl("fourier_projection_forward", TORCH_BOX(&forward));
  m.impl("fourier_projection_backward", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
