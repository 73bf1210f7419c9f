// torch operators perceiver_fast::grid_cross_attention_{forward,backward} for CPU tensors, on torch's stable ABI:
// pre-normalised cross-attention of latents [B, N, D] to the tokens of a grid, added to the latents; csrc/core computes.
// Shapes and dtypes are checked here. Threads are torch's. Operands that are not dense are copied.
#include "../core/grid_cross_attention.h"

#include <tuple>

#include "checks.h"

namespace perceiver_fast {
namespace {

constexpr Check check{"grid_cross_attention"};
constexpr size_t kParameters = 8;  // in the order of core's GridCrossAttentionParameters

using Tensors = std::vector<Tensor>;

// Dense inputs, alive as long as the raw pointers taken from them.
struct Inputs {
  ScalarType dtype;
  Shape grid;  // [B, *sizes]
  int64_t x_batch, latents, channels, heads, inner, features, context_channels, entries;
  double logit_scale, eps;
  Dropout dropout;
  Tensor x, feat;
  Tensors codes;
  std::optional<Tensor> scale, mask;
  Tensors parameters;
  std::vector<Shape> shapes;  // of the parameters

  Inputs(const Tensor& x_, const Tensor& feat_, const std::optional<Tensor>& scale_, const std::optional<Tensor>& mask_,
         const Tensors& codes_, const Tensors& given, int64_t heads_, double logit_scale_, double eps_,
         double probability, const std::optional<Tensor>& seed)
      : dtype(check.floating("x", x_)),
        heads(heads_),
        logit_scale(logit_scale_),
        eps(eps_),
        dropout(check.dropout(probability, seed)) {
    check.rank("x", x_, 3, "[B, N, D]");
    x_batch = x_.size(0), latents = x_.size(1), channels = x_.size(2);
    check.dtype("feat", feat_, dtype);
    grid = sizes_of(feat_);
    STD_TORCH_CHECK(grid.size() >= 3 && grid.size() - 2 <= 64,
                    "grid_cross_attention: expected feat [B, *sizes, F] of 1 to 64 axes, got shape ", text_of(grid));
    STD_TORCH_CHECK(x_.numel() > 0 && feat_.numel() > 0,
                    "grid_cross_attention: expected latents and tokens, got shapes ", text_of(sizes_of(x_)), " and ",
                    text_of(grid));
    features = grid.back();
    grid.pop_back();
    STD_TORCH_CHECK(x_batch == 1 || x_batch == grid[0], "grid_cross_attention: expected x of a batch of ", grid[0],
                    " or 1, got ", x_batch);
    STD_TORCH_CHECK(std::isfinite(eps) && eps > 0, "grid_cross_attention: expected eps above 0, got ", eps);
    STD_TORCH_CHECK(given.size() == kParameters, "grid_cross_attention: expected ", kParameters, " parameters, got ",
                    given.size());
    check.rank("to_q", given[2], 2, "[I, D]");
    inner = given[2].size(0), context_channels = features;
    // Tokens of no axis have neither codes nor a scale, as they are normalised.
    const bool has_axes = scale_.has_value() || !codes_.empty();
    STD_TORCH_CHECK(!has_axes || scale_, "grid_cross_attention: expected scale beside codes, got none");
    STD_TORCH_CHECK(codes_.size() + 1 == (has_axes ? grid.size() : 1),
                    "grid_cross_attention: expected codes of ", has_axes ? grid.size() - 1 : 0, " axes, got ",
                    codes_.size());
    STD_TORCH_CHECK(has_axes || !dropout, "grid_cross_attention: expected no dropout of tokens of no axis, got some");
    STD_TORCH_CHECK(has_axes || grid.size() == 2,
                    "grid_cross_attention: expected feat [B, M, C] of tokens of no axis, got batch and axes ", text_of(grid));
    for (size_t a = 0; a < codes_.size(); ++a) {
      check.rank("codes", codes_[a], 2, "[n, C] of every axis");
      codes.push_back(check.dense("codes", codes_[a], dtype, {grid[a + 1], codes_[a].size(1)}, "[n, C] of every axis"));
      context_channels += codes_[a].size(1);
    }
    check.rank("to_kv", given[5], 2, "[2 I, C]");
    // Whether the last of feat is the mean.
    if (has_axes && features > 1 && given[5].size(1) == context_channels - 1) --context_channels;
    STD_TORCH_CHECK(heads > 0 && inner > 0 && inner % heads == 0,
                    "grid_cross_attention: expected channels for every one of ", heads, " heads, got ", inner);
    entries = (has_axes ? check.sum("entries of a query", Shape(grid.begin() + 1, grid.end())) : 0) + features;
    const int64_t C = context_channels, I = inner, D = channels;
    shapes = {{D}, {D}, {I, D}, {C}, {C}, {2 * I, C}, {D, I}, {D}};
    static constexpr const char* names[kParameters] = {"norm_weight",  "norm_bias", "to_q",   "context_weight",
                                                       "context_bias", "to_kv",     "to_out", "to_out_bias"};
    for (size_t i = 0; i < kParameters; ++i)
      parameters.push_back(check.dense(names[i], given[i], dtype, shapes[i], "beside x, to_q and codes"));
    scale = check.dense("scale", scale_, dtype, grid, "[B, *sizes]");
    check.dtype("mask", mask_, ScalarType::Bool);
    check.shape("mask", mask_, grid, "[B, *sizes]");
    if (mask_) mask = dense(*mask_);
    x = dense(x_);
    feat = dense(feat_);
  }

  Shape queries(int64_t batch) const { return {batch, heads * latents, entries}; }
  Shape kept() const { return dropout ? Shape{grid[0], heads * latents} : Shape{0}; }

  template <class X>
  static GridCrossAttentionParameters<X> of(const Tensors& p) {
    return {data<X>(p[0]), data<X>(p[1]), data<X>(p[2]), data<X>(p[3]),
            data<X>(p[4]), data<X>(p[5]), data<X>(p[6]), data<X>(p[7])};
  }

  template <class T>
  GridCrossAttention<T> view() const {
    GridCrossAttention<T> call;
    call.batch = grid[0], call.x_batch = x_batch;
    call.latents = latents, call.channels = channels;
    call.heads = heads, call.inner = inner, call.features = features, call.context_channels = context_channels;
    if (scale) call.sizes.assign(grid.begin() + 1, grid.end());
    call.tokens = feat.numel() / (grid[0] * features);
    call.logit_scale = logit_scale, call.eps = eps;
    call.x = data<const T>(x), call.feat = data<const T>(feat), call.scale = data<const T>(scale);
    call.mask = data<const uint8_t>(mask);
    for (const Tensor& code : codes) {
      call.codes.push_back(data<const T>(code));
      call.code_channels.push_back(code.size(1));
    }
    call.dropout = dropout;
    call.parameters = of<const T>(parameters);
    return call;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& feat, const std::optional<Tensor>& scale, const std::optional<Tensor>& mask,
    const Tensors& codes, const Tensors& parameters, int64_t heads, double logit_scale, double eps, double dropout,
    const std::optional<Tensor>& seed) {
  const Inputs in(x, feat, scale, mask, codes, parameters, heads, logit_scale, eps, dropout, seed);
  const int64_t B = in.grid[0];
  Tensor y = torch::stable::new_empty(x, {B, in.latents, in.channels}), rest = y;
  Tensor q = torch::stable::new_empty(x, in.queries(in.x_batch)), o = torch::stable::new_empty(x, in.queries(B));
  Tensor lse = torch::stable::new_empty(x, {B, in.heads * in.latents}, ScalarType::Double);
  Tensor kept = torch::stable::new_empty(x, in.kept());
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const auto call = in.view<T>();
    rest = torch::stable::new_empty(x, {grid_cross_attention_rest(call)});
    grid_cross_attention_forward<T>(
        call, data<T>(y),
        {data<T>(q), data<T>(o), data<double>(lse), in.dropout ? data<T>(kept) : nullptr, data<T>(rest)},
        torch_parallel());
  });
  return {y, q, o, lse, kept, rest};
}

std::tuple<Tensor, Tensors> backward(const Tensor& d_y, const Tensor& x, const Tensor& feat,
                                     const std::optional<Tensor>& scale, const std::optional<Tensor>& mask,
                                     const Tensors& codes, const Tensors& parameters, int64_t heads, double logit_scale,
                                     double eps, double dropout, const std::optional<Tensor>& seed, const Tensor& q,
                                     const Tensor& o, const Tensor& lse, const Tensor& kept, const Tensor& rest) {
  const Inputs in(x, feat, scale, mask, codes, parameters, heads, logit_scale, eps, dropout, seed);
  const int64_t B = in.grid[0];
  const Tensor grad = check.dense("d_y", d_y, in.dtype, {B, in.latents, in.channels}, "[B, N, D]");
  const Tensor queries = check.dense("q", q, in.dtype, in.queries(in.x_batch), "[B, H N, L]");
  const Tensor results = check.dense("o", o, in.dtype, in.queries(B), "[B, H N, L]");
  const Tensor sums = check.dense("lse", lse, ScalarType::Double, {B, heads * in.latents}, "[B, H N]");
  const Tensor weights = check.dense("kept", kept, in.dtype, in.kept(), "[B, H N] with dropout, else empty");
  Tensor d_x = torch::stable::new_empty(x, sizes_of(x));
  Tensors gradients;
  for (const Shape& shape : in.shapes) gradients.push_back(torch::stable::new_empty(x, shape));
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const auto call = in.view<T>();
    const Tensor saved = check.dense("rest", rest, in.dtype, {grid_cross_attention_rest(call)}, "what a forward saved");
    grid_cross_attention_backward<T>(call, data<T>(grad),
                                     {data<T>(queries), data<T>(results), data<double>(sums),
                                      in.dropout ? data<T>(weights) : nullptr, data<T>(saved)},
                                     data<T>(d_x), Inputs::of<T>(gradients), torch_parallel());
  });
  return {d_x, gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CPU, m) {
  m.impl("grid_cross_attention_forward", TORCH_BOX(&forward));
  m.impl("grid_cross_attention_backward", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
