// torch operators perceiver_fast::fourier_projection_{forward,backward} for CUDA tensors, on torch's stable ABI.
// perceiver_fast/ops/fourier_projection.py defines the schemas and explains the maths.
#include "fourier_projection_dtokens.cuh"
#include "fourier_projection_dweight.cuh"
#include "fourier_projection_forward.cuh"

#include "torch_stable.h"

#include <tuple>

namespace perceiver_fast {
namespace {

// Dense inputs of one device, alive as long as the raw pointers taken from them.
struct Inputs {
  std::optional<Tensor> feat;
  Tensor coords, frequencies, weight;
  int64_t batch, positions;  // B, M

  Inputs(const std::optional<Tensor>& feat_, const Tensor& coords_, const Tensor& frequencies_, const Tensor& weight_)
      : coords(torch::stable::contiguous(coords_)), frequencies(torch::stable::contiguous(frequencies_)),
        weight(torch::stable::contiguous(weight_)) {
    STD_TORCH_CHECK(coords.dim() == 3 && frequencies.dim() == 2 && weight.dim() == 2,
                    "fourier_projection: expected coords [B, M, A], frequencies [A, K], weight [C, D]");
    STD_TORCH_CHECK(coords.scalar_type() == ScalarType::Double && frequencies.scalar_type() == ScalarType::Double,
                    "fourier_projection: expected float64 coords and frequencies");
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float || weight.scalar_type() == ScalarType::Double,
                    "fourier_projection: expected a float32 or float64 weight");
    same_device(coords, "coords");
    same_device(frequencies, "frequencies");
    batch = coords.size(0);
    positions = coords.size(1);
    const int64_t axes = coords.size(2), bands = frequencies.size(1);
    STD_TORCH_CHECK(frequencies.size(0) == axes, "fourier_projection: expected frequencies of ", axes, " axes, got ",
                    frequencies.size(0));
    if (feat_) {
      feat = torch::stable::contiguous(*feat_);
      STD_TORCH_CHECK(feat->dim() == 3 && feat->size(1) == positions && (batch == 1 || batch == feat->size(0)),
                      "fourier_projection: expected feat [B, M, F] of coords' M and, unless that is 1, batch");
      STD_TORCH_CHECK(feat->scalar_type() == weight.scalar_type(),
                      "fourier_projection: expected feat and weight of one dtype");
      same_device(*feat, "feat");
      batch = feat->size(0);
    }
    STD_TORCH_CHECK(axes * bands * std::max<int64_t>(bands, 1) < int64_t(1) << 31,
                    "fourier_projection: too many bands: ", axes, " axes of ", bands);
    const int64_t channels = features() + axes * (2 * bands + 1);
    STD_TORCH_CHECK(channels == weight.size(0) && channels > 0 && channels < int64_t(1) << 30,
                    "fourier_projection: expected weight of C = F + A (2 K + 1) = ", channels, " rows, got ",
                    weight.size(0));
    STD_TORCH_CHECK(columns() < 65536 * kColumns, "fourier_projection: weight has too many columns: ", columns());
  }

  void same_device(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == weight.get_device_index(),
                    "fourier_projection: expected ", name, " on weight's device");
  }

  // `t`, dense, if it has weight's dtype and device and this shape.
  Tensor dense(const Tensor& t, const std::vector<int64_t>& shape, const char* name) const {
    bool same = t.dim() == int64_t(shape.size()) && t.scalar_type() == weight.scalar_type();
    for (size_t a = 0; same && a < shape.size(); ++a) same = t.size(a) == shape[a];
    STD_TORCH_CHECK(same, "fourier_projection: expected ", name, " of the op's shape and weight's dtype");
    same_device(t, name);
    return torch::stable::contiguous(t);
  }

  int64_t features() const { return feat ? feat->size(2) : 0; }
  int64_t columns() const { return weight.size(1); }
  bool empty() const { return batch * positions == 0 || columns() == 0; }

  template <class T>
  FourierTokens<T> tokens() const {
    return {feat ? static_cast<const T*>(feat->data_ptr()) : nullptr,
            static_cast<const double*>(coords.data_ptr()),
            static_cast<const double*>(frequencies.data_ptr()),
            batch * positions,
            coords.size(0) * positions,
            int(features()),
            int(coords.size(2)),
            int(frequencies.size(1))};
  }

  template <class Run>
  void with_type(const Run& run) const {
    if (weight.scalar_type() == ScalarType::Double) run(0.0);
    else run(0.0f);
  }
};

template <class T>
T* pointer(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor> forward(const std::optional<Tensor>& feat, const Tensor& coords, const Tensor& frequencies,
                                   const Tensor& weight, const std::optional<Tensor>& bias,
                                   const std::optional<double>& eps) {
  const DeviceGuard guard(weight.get_device_index());
  const Inputs in(feat, coords, frequencies, weight);
  std::optional<Tensor> shift;
  if (bias) shift = in.dense(*bias, {in.columns()}, "bias");
  Tensor out = torch::stable::new_empty(weight, {in.batch, in.positions, in.columns()});
  Tensor scale = torch::stable::new_empty(
      weight, eps ? std::vector<int64_t>{in.batch, in.positions} : std::vector<int64_t>{0});
  if (in.batch * in.positions == 0) return {out, scale};
  in.with_type([&](auto zero) {
    using T = decltype(zero);
    fourier_projection_forward<T>(Launch{current_stream(weight)}, in.tokens<T>(), pointer<T>(in.weight),
                                  shift ? pointer<T>(*shift) : nullptr, int(in.columns()), eps.value_or(0.0),
                                  pointer<T>(scale), pointer<T>(out));
  });
  return {out, scale};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_out, const std::optional<Tensor>& feat,
                                            const Tensor& coords, const Tensor& frequencies, const Tensor& weight,
                                            const Tensor& scale, const std::optional<double>& eps, bool token_grads) {
  const DeviceGuard guard(weight.get_device_index());
  const Inputs in(feat, coords, frequencies, weight);
  const int64_t axes = in.coords.size(2), columns = in.columns();
  const Tensor grad = in.dense(d_out, {in.batch, in.positions, columns}, "d_out");
  const Tensor scales = eps ? in.dense(scale, {in.batch, in.positions}, "scale") : scale;
  const auto cuda_empty = [&](bool wanted, std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(weight, wanted ? shape : std::vector<int64_t>{0}, dtype);
  };
  const ScalarType own = weight.scalar_type();
  const Tensor dweight = cuda_empty(true, {in.weight.size(0), columns}, own);
  const Tensor dfeat = cuda_empty(token_grads && in.feat, {in.batch, in.positions, in.features()}, own);
  const Tensor dcoords = cuda_empty(token_grads, {in.coords.size(0), in.positions, axes}, ScalarType::Double);
  const Launch launch{current_stream(weight)};
  if (in.empty()) {
    for (const Tensor& t : {dweight, dfeat, dcoords})
      if (t.numel())
        STD_CUDA_CHECK(cudaMemsetAsync(t.data_ptr(), 0, t.numel() * t.element_size(), launch.stream));
    return {dweight, dfeat, dcoords};
  }
  in.with_type([&](auto zero) {
    using T = decltype(zero);
    const FourierTokens<T> tokens = in.tokens<T>();
    const T* r = eps ? pointer<T>(scales) : nullptr;
    const int splits = weight_splits(tokens, int(columns));
    const Tensor partial = cuda_empty(splits > 1, {splits, tokens.channels, columns}, own);
    fourier_projection_dweight<T>(launch, tokens, pointer<T>(grad), r, int(columns), pointer<T>(partial),
                                  pointer<T>(dweight));
    if (!token_grads) return;
    const Tensor spread = cuda_empty(eps.has_value(), {tokens.tokens, axes}, ScalarType::Double);
    const Tensor rows = cuda_empty(tokens.positions != tokens.tokens, {tokens.tokens, axes}, ScalarType::Double);
    fourier_projection_dtokens<T>(launch, tokens, pointer<T>(grad), pointer<T>(in.weight), r, int(columns),
                                  pointer<double>(spread), pointer<double>(rows), pointer<T>(dfeat),
                                  pointer<double>(dcoords));
  });
  return {dweight, dfeat, dcoords};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CUDA, m) {
  m.impl("fourier_projection_forward", TORCH_BOX(&forward));
  m.impl("fourier_projection_backward", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
