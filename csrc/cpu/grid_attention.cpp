// torch operators perceiver_fast::grid_attention_{forward,backward} for CPU tensors, on torch's stable ABI: attention
// of q [B, N, L] to the tokens of a grid, feat [B, *sizes, F] and scale [B, *sizes]; csrc/core computes.
// perceiver_fast/ops/grid_attention.py defines the schemas. Threads are torch's. Operands that are not dense are copied,
// except queries that the whole batch shares.
#include "../core/grid_attention.h"

#include <tuple>

#include "checks.h"

namespace perceiver_fast {
namespace {

constexpr Check check{"grid_attention"};

// Dense inputs, alive as long as the raw pointers taken from them.
struct Inputs {
  Dropout dropout;
  bool inverted;
  Shape sizes;             // of the axes
  int64_t tokens, length;  // M, and L
  int64_t heads;           // consecutive elements of q's batch that share tokens
  Tensor q, feat, scale;
  std::optional<Tensor> mask;

  Inputs(const Tensor& q_, const Tensor& feat_, const Tensor& scale_, const std::optional<Tensor>& mask_,
         double probability, const std::optional<Tensor>& seed, bool inverted_)
      : dropout(check.dropout(probability, seed)), inverted(inverted_) {
    const ScalarType dtype = check.floating("q", q_);
    check.dtype("feat", feat_, dtype);
    check.dtype("scale", scale_, dtype);
    check.dtype("mask", mask_, ScalarType::Bool);
    check.rank("q", q_, 3, "[B, N, L]");
    Shape grid = sizes_of(feat_);  // [B, *sizes], when F is taken off
    STD_TORCH_CHECK(grid.size() >= 3 && grid.size() - 2 <= 64,
                    "grid_attention: expected feat [B, *sizes, F] of 1 to 64 axes, got shape ", text_of(grid));
    const int64_t features = grid.back();
    grid.pop_back();
    sizes.assign(grid.begin() + 1, grid.end());
    for (int64_t size : sizes)
      STD_TORCH_CHECK(size > 0, "grid_attention: expected a grid without empty axes, got sizes ", text_of(sizes));
    tokens = check.product("tokens", sizes);
    check.product("tokens", grid);
    Shape entries = sizes;
    entries.push_back(features);
    length = check.sum("entries of a query", entries);
    heads = grid[0] > 0 ? q_.size(0) / grid[0] : 1;
    STD_TORCH_CHECK(heads * grid[0] == q_.size(0) && (heads == 1 || (inverted && heads > 0)),
                    "grid_attention: expected q of feat's batch size ", grid[0],
                    ", or with inverted a multiple of it, got ", q_.size(0));
    check.product("queries", {q_.size(0), q_.size(1)});
    check.shape("q", q_, {q_.size(0), q_.size(1), length}, "[B, N, F + sum(sizes)]");
    check.shape("scale", scale_, grid, "[B, *sizes]");
    check.shape("mask", mask_, grid, "[B, *sizes]");
    q = shares_queries(q_) ? q_ : dense(q_);
    feat = dense(feat_);
    scale = dense(scale_);
    if (mask_) mask = dense(*mask_);
  }

  bool empty() const { return q.size(0) == 0; }

  // One set of queries expanded over the batch.
  static bool shares_queries(const Tensor& q) {
    return q.dim() == 3 && q.stride(0) == 0 && q.stride(2) == 1 && q.stride(1) == q.size(2);
  }

  template <class T>
  GridAttentionInput<T> view() const {
    GridAttentionInput<T> in;
    in.batch = q.size(0);
    in.heads = heads;
    in.dropout = dropout;
    in.inverted = inverted;
    in.queries = q.size(1);
    in.features = feat.size(feat.dim() - 1);
    in.sizes = sizes;
    in.q = data<const T>(q);
    in.q_batch_stride = q.stride(0) == 0 ? 0 : q.size(1) * q.size(2);
    in.feat = data<const T>(feat);
    in.scale = data<const T>(scale);
    in.mask = data<const uint8_t>(mask);
    return in;
  }
};

// A tensor where it has content.
std::optional<Tensor> given(bool there, const Tensor& t) { return there ? std::optional<Tensor>(t) : std::nullopt; }

template <class T>
GridAttentionOutput<T> outputs(const Tensor& o, const Tensor& lse, const std::optional<Tensor>& kept,
                               const std::optional<Tensor>& token_lse) {
  return {data<T>(o), data<double>(lse), data<T>(kept), data<double>(token_lse)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& feat, const Tensor& scale,
                                                   const std::optional<Tensor>& mask, double dropout,
                                                   const std::optional<Tensor>& seed, bool inverted) {
  const Inputs inputs(q, feat, scale, mask, dropout, seed, inverted);
  const int64_t B = q.size(0), N = q.size(1);
  const bool counts = dropout > 0 || inverted;
  Tensor o = torch::stable::new_empty(q, sizes_of(q));
  Tensor lse = torch::stable::new_empty(q, {B, N}, ScalarType::Double);
  Tensor kept = torch::stable::new_empty(q, counts ? Shape{B, N} : Shape{0});
  Tensor token_lse =
      torch::stable::new_empty(q, inverted ? Shape{B, inputs.tokens} : Shape{0}, ScalarType::Double);
  if (inputs.empty()) return {o, lse, kept, token_lse};
  with_type(q, [&](auto zero) {
    using T = decltype(zero);
    grid_attention_forward<T>(inputs.view<T>(), outputs<T>(o, lse, given(counts, kept), given(inverted, token_lse)),
                              torch_parallel());
  });
  return {o, lse, kept, token_lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_o, const std::optional<Tensor>& d_lse,
                                            const std::optional<Tensor>& d_kept, const Tensor& q, const Tensor& feat,
                                            const Tensor& scale, const std::optional<Tensor>& mask, double dropout,
                                            const std::optional<Tensor>& seed, bool inverted, const Tensor& o,
                                            const Tensor& lse, const Tensor& kept, const Tensor& token_lse,
                                            bool token_grads) {
  const Inputs inputs(q, feat, scale, mask, dropout, seed, inverted);
  const auto dtype = q.scalar_type();
  const bool counts = dropout > 0 || inverted;
  STD_TORCH_CHECK(!d_kept || counts, "grid_attention: expected no d_kept without dropout or inverted, got one");
  const Shape outputs_shape = sizes_of(q), rows{q.size(0), q.size(1)}, columns{q.size(0), inputs.tokens};
  const Tensor grad = check.dense("d_o", d_o, dtype, outputs_shape, "[B, N, L]");
  const Tensor out = check.dense("o", o, dtype, outputs_shape, "[B, N, L]");
  const Tensor stats = check.dense("lse", lse, ScalarType::Double, rows, "[B, N]");
  const auto grad_lse = check.dense("d_lse", d_lse, ScalarType::Double, rows, "[B, N]");
  const auto grad_kept = check.dense("d_kept", d_kept, dtype, rows, "[B, N]");
  const Shape none{0};  // what the forward gives where there is nothing to say
  const Tensor sums = check.dense("kept", kept, dtype, counts ? rows : none, counts ? "[B, N]" : "empty");
  const Tensor token_stats = check.dense("token_lse", token_lse, ScalarType::Double, inverted ? columns : none,
                                         inverted ? "[B, M]" : "empty");
  Shape feat_shape = sizes_of(feat), scale_shape = sizes_of(scale);
  feat_shape[0] = scale_shape[0] = q.size(0);  // every head its own
  Tensor dq = torch::stable::new_empty(q, sizes_of(q));
  Tensor dfeat = torch::stable::new_empty(q, token_grads ? feat_shape : Shape{0});
  Tensor dscale = torch::stable::new_empty(q, token_grads ? scale_shape : Shape{0});
  if (inputs.empty()) return {dq, dfeat, dscale};
  with_type(q, [&](auto zero) {
    using T = decltype(zero);
    grid_attention_backward<T>(inputs.view<T>(), outputs<T>(out, stats, given(counts, sums), given(inverted, token_stats)),
                               {data<const T>(grad), data<const double>(grad_lse), data<const T>(grad_kept)},
                               data<T>(dq), token_grads ? data<T>(dfeat) : nullptr,
                               token_grads ? data<T>(dscale) : nullptr, torch_parallel());
  });
  return {dq, dfeat, dscale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CPU, m) {
  m.impl("grid_attention_forward", TORCH_BOX(&forward));
  m.impl("grid_attention_backward", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
