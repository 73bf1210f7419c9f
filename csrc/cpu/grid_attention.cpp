// torch operators perceiver_fast::grid_attention_{forward,backward} for CPU tensors, on torch's stable ABI: attention
// of q [B, N, L] to the tokens of a grid, feat [B, *sizes, F] and scale [B, *sizes]; csrc/core computes.
// perceiver_fast/ops/grid_attention.py defines the schemas and checks what users pass; here is checked what memory
// safety needs. Threads are torch's. Operands that are not dense are copied, except queries that the whole batch
// shares.
#include "../core/grid_attention.h"

#include "torch_stable.h"

#include <tuple>

namespace perceiver_fast {
namespace {

// Dense inputs, alive as long as the raw pointers taken from them.
struct Inputs {
  Dropout dropout;
  bool inverted;
  Tensor q, feat, scale;
  std::optional<Tensor> mask;

  Inputs(const Tensor& q_, const Tensor& feat_, const Tensor& scale_, const std::optional<Tensor>& mask_,
         double probability, const std::optional<Tensor>& seed, bool inverted_)
      : dropout(dropout_of(probability, seed)), inverted(inverted_),
        q(shares_queries(q_) ? q_ : torch::stable::contiguous(q_)), feat(torch::stable::contiguous(feat_)),
        scale(torch::stable::contiguous(scale_)) {
    STD_TORCH_CHECK(q.dim() == 3 && feat.dim() >= 3 && scale.dim() == feat.dim() - 1,
                    "grid_attention: expected q [B, N, L], feat [B, *sizes, F], scale [B, *sizes]");
    STD_TORCH_CHECK(q.scalar_type() == feat.scalar_type() && q.scalar_type() == scale.scalar_type(),
                    "grid_attention: expected q, feat and scale of one dtype");
    STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float || q.scalar_type() == ScalarType::Double,
                    "grid_attention: expected float32 or float64");
    STD_TORCH_CHECK(feat.dim() - 2 <= 64, "grid_attention: expected at most 64 axes, got ", feat.dim() - 2);
    const int64_t per = feat.size(0) > 0 ? q.size(0) / feat.size(0) : 1;
    STD_TORCH_CHECK(per * feat.size(0) == q.size(0) && (per == 1 || (inverted && per > 0)),
                    "grid_attention: expected q and feat of one batch size (inverted: q of a multiple, its heads)");
    same_grid(scale, "scale");
    if (mask_) {
      mask = torch::stable::contiguous(*mask_);
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "grid_attention: expected a bool mask");
      STD_TORCH_CHECK(mask->dim() == scale.dim(), "grid_attention: expected mask [B, *sizes]");
      same_grid(*mask, "mask");
    }
  }

  void same_grid(const Tensor& t, const char* name) const {
    for (int64_t a = 0; a < t.dim(); ++a)
      STD_TORCH_CHECK(t.size(a) == feat.size(a) && (a == 0 || t.size(a) > 0), "grid_attention: expected ", name,
                      " of feat's batch and sizes, none empty; dimension ", a, " is ", t.size(a), ", not ",
                      feat.size(a));
  }

  // A dense tensor of q's shape, up to `dims` dimensions.
  Tensor like_q(const Tensor& t, int64_t dims, ScalarType dtype, const char* name) const {
    STD_TORCH_CHECK(t.dim() == dims && t.scalar_type() == dtype, "grid_attention: expected ", name, " of ", dims,
                    " dimensions and the dtype the forward gives it");
    for (int64_t a = 0; a < dims; ++a)
      STD_TORCH_CHECK(t.size(a) == q.size(a), "grid_attention: expected ", name, " of q's shape");
    return torch::stable::contiguous(t);
  }

  // One set of queries expanded over the batch.
  static bool shares_queries(const Tensor& q) {
    return q.dim() == 3 && q.stride(0) == 0 && q.stride(2) == 1 && q.stride(1) == q.size(2);
  }

  template <class T>
  GridAttentionInput<T> view() const {
    GridAttentionInput<T> in;
    in.batch = q.size(0);
    in.heads = feat.size(0) > 0 ? q.size(0) / feat.size(0) : 1;
    in.dropout = dropout;
    in.inverted = inverted;
    in.queries = q.size(1);
    in.features = feat.size(feat.dim() - 1);
    int64_t length = in.features;
    for (int64_t a = 1; a + 1 < feat.dim(); ++a) {
      in.sizes.push_back(feat.size(a));
      length += feat.size(a);
    }
    STD_TORCH_CHECK(length == q.size(2), "grid_attention: expected q of length F + sum(sizes) = ", length, ", got ",
                    q.size(2));
    in.q = data<const T>(q);
    in.q_batch_stride = q.stride(0) == 0 ? 0 : q.size(1) * q.size(2);
    in.feat = data<const T>(feat);
    in.scale = data<const T>(scale);
    in.mask = data<const uint8_t>(mask);
    return in;
  }
};

template <class T>
GridAttentionOutput<T> outputs(const Tensor& o, const Tensor& lse, const Tensor& kept, const Tensor& token_lse) {
  return {data<T>(o), data<double>(lse), kept.dim() == 2 ? data<T>(kept) : nullptr,
          token_lse.dim() == 2 ? data<double>(token_lse) : nullptr};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& feat, const Tensor& scale,
                                                   const std::optional<Tensor>& mask, double dropout,
                                                   const std::optional<Tensor>& seed, bool inverted) {
  const Inputs inputs(q, feat, scale, mask, dropout, seed, inverted);
  const int64_t B = q.size(0), N = q.size(1), heads = feat.size(0) > 0 ? B / feat.size(0) : 1;
  const bool counts = dropout > 0 || inverted;
  Tensor o = torch::stable::new_empty(q, sizes_of(q));
  Tensor lse = torch::stable::new_empty(q, {B, N}, ScalarType::Double);
  Tensor kept = torch::stable::new_empty(q, counts ? std::vector<int64_t>{B, N} : std::vector<int64_t>{0});
  std::vector<int64_t> token_shape{0};
  if (inverted) token_shape = {B, scale.numel() / (heads > 0 && B > 0 ? B / heads : 1)};
  Tensor token_lse = torch::stable::new_empty(q, token_shape, ScalarType::Double);
  with_type(q, [&](auto zero) {
    using T = decltype(zero);
    grid_attention_forward<T>(inputs.view<T>(), outputs<T>(o, lse, kept, token_lse), torch_parallel());
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
  const Tensor grad = inputs.like_q(d_o, 3, dtype, "d_o"), out = inputs.like_q(o, 3, dtype, "o");
  const Tensor stats = inputs.like_q(lse, 2, ScalarType::Double, "lse");
  const bool counts = dropout > 0 || inverted;
  const Tensor sums = counts ? inputs.like_q(kept, 2, dtype, "kept") : kept;
  const Tensor token_stats = torch::stable::contiguous(token_lse);
  STD_TORCH_CHECK(!inverted || (token_lse.scalar_type() == ScalarType::Double &&
                                token_lse.numel() * feat.size(0) == q.size(0) * scale.numel()),
                  "grid_attention: expected token_lse [B, M] float64");
  STD_TORCH_CHECK(!d_lse || !inverted, "grid_attention: inverted attention's lse has no gradient");
  STD_TORCH_CHECK(!d_kept || counts, "grid_attention: expected no gradient of kept without dropout or inverted");
  std::optional<Tensor> grad_lse, grad_kept;
  if (d_lse) grad_lse = inputs.like_q(*d_lse, 2, ScalarType::Double, "d_lse");
  if (d_kept) grad_kept = inputs.like_q(*d_kept, 2, dtype, "d_kept");
  std::vector<int64_t> feat_shape = sizes_of(feat), scale_shape = sizes_of(scale);
  feat_shape[0] = scale_shape[0] = q.size(0);  // every head its own
  Tensor dq = torch::stable::new_empty(q, sizes_of(q));
  Tensor dfeat = torch::stable::new_empty(q, token_grads ? feat_shape : std::vector<int64_t>{0});
  Tensor dscale = torch::stable::new_empty(q, token_grads ? scale_shape : std::vector<int64_t>{0});
  with_type(q, [&](auto zero) {
    using T = decltype(zero);
    grid_attention_backward<T>(inputs.view<T>(), outputs<T>(out, stats, sums, token_stats),
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
