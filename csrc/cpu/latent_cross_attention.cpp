// torch operators perceiver_fast::latent_cross_attention_{forward,backward} for CPU tensors, on torch's stable ABI:
// pre-normalised cross-attention of latents [B, N, D] to keys and values [B, M, 2 I]; csrc/core computes. Shapes and dtypes
// are checked here. Threads are torch's. Operands that are not dense are copied.
#include "../core/latent_cross_attention.h"

#include <tuple>

#include "checks.h"

namespace perceiver_fast {
namespace {

constexpr Check check{"latent_cross_attention"};
constexpr size_t kParameters = 5;  // in the order of core's LatentCrossAttentionParameters

using Tensors = std::vector<Tensor>;

// Dense inputs, alive as long as the raw pointers taken from them.
struct Inputs {
  ScalarType dtype;
  int64_t batch, x_batch, latents, channels, tokens, heads, inner;
  bool adds;
  double logit_scale, eps;
  Dropout dropout;
  Tensor x, keys_values;
  std::optional<Tensor> mask;
  Tensors parameters;
  std::vector<Shape> shapes;  // of the parameters

  Inputs(const Tensor& x_, const Tensor& keys_values_, const std::optional<Tensor>& mask_, const Tensors& given,
         int64_t heads_, double logit_scale_, double eps_, double probability, const std::optional<Tensor>& seed,
         bool adds_)
      : dtype(check.floating("x", x_)),
        heads(heads_),
        adds(adds_),
        logit_scale(logit_scale_),
        eps(eps_),
        dropout(check.dropout(probability, seed)) {
    check.rank("x", x_, 3, "[B, N, D]");
    check.rank("keys_values", keys_values_, 3, "[B, M, 2 I]");
    x_batch = x_.size(0), latents = x_.size(1), channels = x_.size(2);
    batch = keys_values_.size(0), tokens = keys_values_.size(1), inner = keys_values_.size(2) / 2;
    STD_TORCH_CHECK(x_.numel() > 0 && keys_values_.numel() > 0,
                    "latent_cross_attention: expected latents and tokens, got shapes ", text_of(sizes_of(x_)), " and ",
                    text_of(sizes_of(keys_values_)));
    STD_TORCH_CHECK(x_batch == 1 || x_batch == batch, "latent_cross_attention: expected x of a batch of ", batch,
                    " or 1, got ", x_batch);
    STD_TORCH_CHECK(std::isfinite(eps) && eps > 0, "latent_cross_attention: expected eps above 0, got ", eps);
    STD_TORCH_CHECK(std::isfinite(logit_scale), "latent_cross_attention: expected a finite logit_scale, got ",
                    logit_scale);
    STD_TORCH_CHECK(given.size() == kParameters, "latent_cross_attention: expected ", kParameters, " parameters, got ",
                    given.size());
    STD_TORCH_CHECK(heads > 0 && inner > 0 && inner % heads == 0,
                    "latent_cross_attention: expected channels for every one of ", heads, " heads, got ", inner);
    const int64_t I = inner, D = channels;
    shapes = {{D}, {D}, {I, D}, {D, I}, {D}};
    static constexpr const char* names[kParameters] = {"norm_weight", "norm_bias", "to_q", "to_out", "to_out_bias"};
    for (size_t i = 0; i < kParameters; ++i)
      parameters.push_back(check.dense(names[i], given[i], dtype, shapes[i], "beside x and keys_values"));
    keys_values = check.dense("keys_values", keys_values_, dtype, {batch, tokens, 2 * I}, "[B, M, 2 I]");
    mask = check.dense("mask", mask_, ScalarType::Bool, {batch, tokens}, "[B, M]");
    x = dense(x_);
  }

  Shape rows(int64_t batch) const { return {batch, heads, latents, inner / heads}; }
  Shape sums() const { return {batch, heads, latents}; }

  template <class X>
  static LatentCrossAttentionParameters<X> of(const Tensors& p) {
    return {data<X>(p[0]), data<X>(p[1]), data<X>(p[2]), data<X>(p[3]), data<X>(p[4])};
  }

  template <class T>
  LatentCrossAttention<T> view() const {
    return {batch,       x_batch, latents, channels,         tokens,  heads,
            inner,       adds,    logit_scale, eps,          dropout, data<const T>(x),
            data<const T>(keys_values), data<const uint8_t>(mask), of<const T>(parameters)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& keys_values,
                                                           const std::optional<Tensor>& mask,
                                                           const Tensors& parameters, int64_t heads, double logit_scale,
                                                           double eps, double dropout,
                                                           const std::optional<Tensor>& seed, bool adds) {
  const Inputs in(x, keys_values, mask, parameters, heads, logit_scale, eps, dropout, seed, adds);
  Tensor y = torch::stable::new_empty(x, {in.batch, in.latents, in.channels}), rest = y;
  Tensor q = torch::stable::new_empty(x, in.rows(in.x_batch)), o = torch::stable::new_empty(x, in.rows(in.batch));
  Tensor lse = torch::stable::new_empty(x, in.sums(), ScalarType::Double);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const auto call = in.view<T>();
    rest = torch::stable::new_empty(x, {latent_cross_attention_rest(call)});
    latent_cross_attention_forward<T>(call, data<T>(y), {data<T>(q), data<T>(o), data<double>(lse), data<T>(rest)},
                                      torch_parallel());
  });
  return {y, q, o, lse, rest};
}

std::tuple<Tensor, Tensor, Tensors> backward(const Tensor& d_y, const Tensor& x, const Tensor& keys_values,
                                             const std::optional<Tensor>& mask, const Tensors& parameters,
                                             int64_t heads, double logit_scale, double eps, double dropout,
                                             const std::optional<Tensor>& seed, bool adds, const Tensor& q,
                                             const Tensor& o, const Tensor& lse, const Tensor& rest) {
  const Inputs in(x, keys_values, mask, parameters, heads, logit_scale, eps, dropout, seed, adds);
  const Tensor grad = check.dense("d_y", d_y, in.dtype, {in.batch, in.latents, in.channels}, "[B, N, D]");
  const Tensor queries = check.dense("q", q, in.dtype, in.rows(in.x_batch), "[B, H, N, d]");
  const Tensor results = check.dense("o", o, in.dtype, in.rows(in.batch), "[B, H, N, d]");
  const Tensor sums = check.dense("lse", lse, ScalarType::Double, in.sums(), "[B, H, N]");
  Tensor d_x = torch::stable::new_empty(x, sizes_of(x));
  Tensor d_keys_values = torch::stable::new_empty(x, sizes_of(keys_values));
  Tensors gradients;
  for (const Shape& shape : in.shapes) gradients.push_back(torch::stable::new_empty(x, shape));
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const auto call = in.view<T>();
    const Tensor kept = check.dense("rest", rest, in.dtype, {latent_cross_attention_rest(call)}, "what a forward saved");
    latent_cross_attention_backward<T>(call, data<T>(grad),
                                       {data<T>(queries), data<T>(results), data<double>(sums), data<T>(kept)},
                                       data<T>(d_x), data<T>(d_keys_values), Inputs::of<T>(gradients), torch_parallel());
  });
  return {d_x, d_keys_values, gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CPU, m) {
  m.impl("latent_cross_attention_forward", TORCH_BOX(&forward));
  m.impl("latent_cross_attention_backward", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
