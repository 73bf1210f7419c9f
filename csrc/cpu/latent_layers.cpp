// torch operators perceiver_fast::latent_layers_{forward,backward} for CPU tensors, on torch's stable ABI: latents
// [B, N, D] through pre-normalised attention and feed-forward layers; csrc/core computes. Shapes and dtypes are checked
// here. Threads are torch's. Operands that are not dense are copied.
#include "../core/latent_layers.h"

#include <tuple>

#include "checks.h"

namespace perceiver_fast {
namespace {

constexpr Check check{"latent_layers"};
constexpr size_t kParameters = 6;  // of a layer: see core's LatentLayerParameters

using Tensors = std::vector<Tensor>;
using Shapes = std::vector<Shape>;

// Dense parameters, alive as long as the raw pointers taken from them.
struct Inputs {
  ScalarType dtype;
  int64_t batch, latents, channels;
  const std::vector<int64_t>& heads;
  const std::vector<double>&scales, &eps;
  Shapes shapes;  // of the parameters
  Tensors parameters, noise;
  std::vector<Dropout> dropouts;  // of attention's weights
  std::vector<bool> noisy;        // whether a layer has noise

  Inputs(const char* name, const Tensor& x, const Tensors& parameters_, const std::vector<int64_t>& heads_,
         const std::vector<double>& scales_, const std::vector<double>& eps_, const std::vector<double>& dropouts_,
         const Tensors& drawn)
      : dtype(check.floating(name, x)), heads(heads_), scales(scales_), eps(eps_) {
    check.rank(name, x, 3, "[B, N, D]");
    batch = x.size(0), latents = x.size(1), channels = x.size(2);
    STD_TORCH_CHECK(x.numel() > 0, "latent_layers: expected latents, got shape ", text_of(sizes_of(x)));
    const size_t layers = heads.size();
    STD_TORCH_CHECK(parameters_.size() == kParameters * layers && scales.size() == layers && eps.size() == layers,
                    "latent_layers: expected heads, a scale, an eps and ", kParameters, " parameters for each layer, got ",
                    layers, ", ", scales.size(), ", ", eps.size(), " and ", parameters_.size());
    STD_TORCH_CHECK(dropouts_.size() == drawn.size() && (drawn.empty() || drawn.size() == layers),
                    "latent_layers: expected dropouts and what was drawn for them of none or all ", layers,
                    " layers, got ", dropouts_.size(), " and ", drawn.size());
    for (size_t i = 0; i < layers; ++i) {
      layer(i, parameters_);
      const bool drops = !drawn.empty() && dropouts_[i] > 0;
      dropouts.push_back(drops && heads[i] > 0 ? check.dropout(dropouts_[i], drawn[i]) : Dropout(0, 0));
      noise.push_back(drops && heads[i] == 0 ? check.dense("noise", drawn[i], dtype, sizes_of(x), "like the latents") : x);
      noisy.push_back(drops && heads[i] == 0);
    }
  }

  void layer(size_t i, const Tensors& given) {
    const Tensor *p = &given[kParameters * i], &last = p[4];
    STD_TORCH_CHECK(std::isfinite(eps[i]) && eps[i] > 0, "latent_layers: expected eps above 0, got ", eps[i]);
    check.rank("the last weight", last, 2, "[D, I]");
    const int64_t D = channels, I = last.size(1), H = heads[i];
    STD_TORCH_CHECK(H >= 0 && I > 0 && (H == 0 || I % H == 0), "latent_layers: expected channels for every one of ", H,
                    " heads, got ", I);
    const Shape first = H > 0 ? Shape{I, D} : Shape{2 * I, D}, second = H > 0 ? Shape{2 * I, D} : Shape{2 * I};
    const Shape expected[kParameters] = {{D}, {D}, first, second, {D, I}, {D}};
    static constexpr const char* names[kParameters] = {"the norm's weight", "the norm's bias", "the first weight",
                                                       "the second weight or bias", "the last weight", "the last bias"};
    for (size_t k = 0; k < kParameters; ++k) {
      shapes.push_back(expected[k]);
      parameters.push_back(check.dense(names[k], p[k], dtype, expected[k], "of its layer"));
    }
  }

  template <class T>
  LatentLayers<T> view() const {
    LatentLayers<T> call{batch, latents, channels, {}};
    for (size_t i = 0; i < heads.size(); ++i)
      call.layers.push_back({heads[i], shapes[kParameters * i + 4][1], scales[i], eps[i], of<const T>(i, parameters),
                             dropouts[i], noisy[i] ? data<const T>(noise[i]) : nullptr});
    return call;
  }

  // Layer i's of a list of parameters or gradients.
  template <class X>
  static LatentLayerParameters<X> of(size_t i, const Tensors& all) {
    const Tensor* p = &all[kParameters * i];
    return {data<X>(p[0]), data<X>(p[1]), data<X>(p[2]), data<X>(p[3]), data<X>(p[4]), data<X>(p[5])};
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensors& parameters, const std::vector<int64_t>& heads,
                                   const std::vector<double>& scales, const std::vector<double>& eps,
                                   const std::vector<double>& dropouts, const Tensors& drawn, bool saves) {
  const Inputs in("x", x, parameters, heads, scales, eps, dropouts, drawn);
  const Tensor latents = dense(x);
  Tensor y = torch::stable::new_empty(x, sizes_of(x)), saved = x;
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const auto call = in.view<T>();
    saved = torch::stable::new_empty(x, {saves ? latent_layers_saved(call) : 0});
    latent_layers_forward<T>(call, data<T>(latents), data<T>(y), saves ? data<T>(saved) : nullptr, torch_parallel());
  });
  return {y, saved};
}

std::tuple<Tensor, Tensors> backward(const Tensor& d_y, const Tensor& saved, const Tensors& parameters,
                                     const std::vector<int64_t>& heads, const std::vector<double>& scales,
                                     const std::vector<double>& eps, const std::vector<double>& dropouts,
                                     const Tensors& drawn, const Tensors& added) {
  const Inputs in("d_y", d_y, parameters, heads, scales, eps, dropouts, drawn);
  const Tensor grad = dense(d_y);
  Tensor d_x = torch::stable::new_empty(d_y, sizes_of(d_y));
  STD_TORCH_CHECK(added.empty() || added.size() == in.shapes.size(),
                  "latent_layers: expected gradients to add to of none or all ", in.shapes.size(), " parameters, got ",
                  added.size());
  Tensors gradients, more;
  for (const Shape& shape : in.shapes) gradients.push_back(torch::stable::new_empty(d_y, shape));
  for (size_t i = 0; i < added.size(); ++i)
    more.push_back(check.dense("added", added[i], in.dtype, in.shapes[i], "like its parameter"));
  with_type(d_y, [&](auto zero) {
    using T = decltype(zero);
    const auto call = in.view<T>();
    const Tensor kept = check.dense("saved", saved, in.dtype, {latent_layers_saved(call)}, "what a forward saved");
    std::vector<LatentLayerParameters<T>> to;
    std::vector<LatentLayerParameters<const T>> from;
    for (size_t i = 0; i < heads.size(); ++i) {
      to.push_back(Inputs::of<T>(i, gradients));
      if (!more.empty()) from.push_back(Inputs::of<const T>(i, more));
    }
    latent_layers_backward<T>(call, data<T>(grad), data<T>(kept), data<T>(d_x), to, from, torch_parallel());
  });
  return {d_x, gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CPU, m) {
  m.impl("latent_layers_forward", TORCH_BOX(&forward));
  m.impl("latent_layers_backward", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
