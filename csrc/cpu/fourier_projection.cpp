// torch operators perceiver_fast::fourier_projection_{forward,backward} for CPU tensors, on torch's stable ABI: out = r
// (z W) + bias of Fourier codes z with positions [Bc, M, A] and features [B, M, F]; csrc/core computes.
// perceiver_fast/ops/fourier_projection.py defines the schemas. Shapes and dtypes are checked here. Threads are
// torch's. Operands that are not dense are copied.
#include "../core/fourier_projection.h"

#include "torch_stable.h"

#include <tuple>

namespace perceiver_fast {
namespace {

std::string shape_of(const Tensor& t) {
  std::string text;
  for (int64_t size : sizes_of(t)) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

void expect(const Tensor& t, const char* name, ScalarType dtype, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "fourier_projection: expected ", name, " of dtype ",
                  torch::headeronly::toString(dtype), ", got ", torch::headeronly::toString(t.scalar_type()));
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(sizes_of(t) == shape, "fourier_projection: expected ", name, " of shape [", text, "], got ",
                  shape_of(t));
}

// Dense inputs, alive as long as the raw pointers taken from them.
struct Inputs {
  std::optional<Tensor> feat;
  Tensor coords, frequencies, weight;
  int64_t batch, tokens, features;

  Inputs(const std::optional<Tensor>& feat_, const Tensor& coords_, const Tensor& frequencies_, const Tensor& weight_)
      : coords(torch::stable::contiguous(coords_)), frequencies(torch::stable::contiguous(frequencies_)),
        weight(torch::stable::contiguous(weight_)) {
    STD_TORCH_CHECK(coords.dim() == 3, "fourier_projection: expected coords [Bc, M, A], got ", shape_of(coords));
    STD_TORCH_CHECK(coords.size(2) > 0 || (feat_ && feat_->dim() == 3 && feat_->size(2) > 0),
                    "fourier_projection: expected at least one axis in coords, or one channel in feat, got coords of ",
                    shape_of(coords));
    STD_TORCH_CHECK(frequencies.dim() == 2, "fourier_projection: expected frequencies [A, K], got ",
                    shape_of(frequencies));
    STD_TORCH_CHECK(weight.dim() == 2, "fourier_projection: expected weight [C, D], got ", shape_of(weight));
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float || weight.scalar_type() == ScalarType::Double,
                    "fourier_projection: expected a weight of float32 or float64, got ",
                    torch::headeronly::toString(weight.scalar_type()));
    batch = coords.size(0);
    tokens = coords.size(1);
    features = 0;
    if (feat_) {
      feat = torch::stable::contiguous(*feat_);
      STD_TORCH_CHECK(feat->dim() == 3, "fourier_projection: expected feat [B, M, F], got ", shape_of(*feat));
      features = feat->size(2);
      if (batch == 1) batch = feat->size(0);
      expect(*feat, "feat", weight.scalar_type(), {batch, tokens, features});
    }
    const int64_t axes = coords.size(2), bands = frequencies.size(1);
    expect(coords, "coords", ScalarType::Double, {coords.size(0), tokens, axes});
    expect(frequencies, "frequencies", ScalarType::Double, {axes, bands});
    expect(weight, "weight", weight.scalar_type(), {features + axes * (2 * bands + 1), weight.size(1)});
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
  std::optional<Tensor> offset;
  if (bias) {
    expect(*bias, "bias", weight.scalar_type(), {outputs});
    offset = torch::stable::contiguous(*bias);
  }
  Tensor out = torch::stable::new_empty(weight, {inputs.batch, inputs.tokens, outputs});
  Tensor scale = torch::stable::new_empty(
      weight, eps ? std::vector<int64_t>{inputs.batch, inputs.tokens} : std::vector<int64_t>{0});
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
  expect(d_out, "d_out", weight.scalar_type(), {inputs.batch, inputs.tokens, weight.size(1)});
  if (eps) expect(scale, "scale", weight.scalar_type(), {inputs.batch, inputs.tokens});
  const Tensor grad = torch::stable::contiguous(d_out), r = torch::stable::contiguous(scale);
  const bool feat_grads = token_grads && feat.has_value();
  Tensor dweight = torch::stable::new_empty(weight, sizes_of(weight));
  Tensor dfeat = torch::stable::new_empty(weight, feat_grads ? sizes_of(*feat) : std::vector<int64_t>{0});
  Tensor dcoords = torch::stable::new_empty(coords, token_grads ? sizes_of(coords) : std::vector<int64_t>{0});
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
