// torch operators perceiver_fast::grid_attention_{forward,backward} for CPU tensors, on torch's stable ABI.
// Shapes are checked in perceiver_fast/ops/grid_attention.py, which also defines the schemas.
#include "../core/grid_attention.h"

#include "torch_stable.h"

#include <tuple>

namespace perceiver_fast {
namespace {

// Dense inputs, kept alive as long as the raw pointers taken from them.
struct Inputs {
  Tensor q, feat, scale;
  std::optional<Tensor> mask;

  Inputs(const Tensor& q_, const Tensor& feat_, const Tensor& scale_, const std::optional<Tensor>& mask_)
      : q(shares_queries(q_) ? q_ : torch::stable::contiguous(q_)), feat(torch::stable::contiguous(feat_)),
        scale(torch::stable::contiguous(scale_)) {
    STD_TORCH_CHECK(q.dim() == 3 && feat.dim() >= 3 && scale.dim() == feat.dim() - 1,
                    "grid_attention: expected q [B, N, L], feat [B, *sizes, F], scale [B, *sizes]");
    STD_TORCH_CHECK(q.scalar_type() == feat.scalar_type() && q.scalar_type() == scale.scalar_type(),
                    "grid_attention: expected q, feat and scale of one dtype");
    STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float || q.scalar_type() == ScalarType::Double,
                    "grid_attention: expected float32 or float64");
    STD_TORCH_CHECK(feat.dim() - 2 <= 64, "grid_attention: expected at most 64 axes, got ", feat.dim() - 2);
    STD_TORCH_CHECK(feat.size(0) == q.size(0), "grid_attention: expected q and feat of one batch size");
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
    in.queries = q.size(1);
    in.features = feat.size(feat.dim() - 1);
    int64_t length = in.features;
    for (int64_t a = 1; a + 1 < feat.dim(); ++a) {
      in.sizes.push_back(feat.size(a));
      length += feat.size(a);
    }
    STD_TORCH_CHECK(length == q.size(2), "grid_attention: expected q of length F + sum(sizes) = ", length, ", got ",
                    q.size(2));
    in.q = static_cast<const T*>(q.data_ptr());
    in.q_batch_stride = q.stride(0) == 0 ? 0 : q.size(1) * q.size(2);
    in.feat = static_cast<const T*>(feat.data_ptr());
    in.scale = static_cast<const T*>(scale.data_ptr());
    in.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
    return in;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& feat, const Tensor& scale,
                                   const std::optional<Tensor>& mask) {
  const Inputs inputs(q, feat, scale, mask);
  Tensor o = torch::stable::new_empty(q, sizes_of(q));
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Double);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    grid_attention_forward<T>(inputs.view<T>(), static_cast<T*>(o.data_ptr()), static_cast<double*>(lse.data_ptr()),
                              torch_parallel());
  };
  if (q.scalar_type() == ScalarType::Double) run(0.0);
  else run(0.0f);
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_o, const std::optional<Tensor>& d_lse, const Tensor& q,
                                            const Tensor& feat, const Tensor& scale, const std::optional<Tensor>& mask,
                                            const Tensor& o, const Tensor& lse, bool token_grads) {
  const Inputs inputs(q, feat, scale, mask);
  const Tensor grad = inputs.like_q(d_o, 3, q.scalar_type(), "d_o"), out = inputs.like_q(o, 3, q.scalar_type(), "o");
  const Tensor stats = inputs.like_q(lse, 2, ScalarType::Double, "lse");
  std::optional<Tensor> grad_lse;
  if (d_lse) grad_lse = inputs.like_q(*d_lse, 2, ScalarType::Double, "d_lse");
  Tensor dq = torch::stable::new_empty(q, sizes_of(q));
  Tensor dfeat = torch::stable::new_empty(q, token_grads ? sizes_of(feat) : std::vector<int64_t>{0});
  Tensor dscale = torch::stable::new_empty(q, token_grads ? sizes_of(scale) : std::vector<int64_t>{0});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    grid_attention_backward<T>(
        inputs.view<T>(), static_cast<const T*>(out.data_ptr()), static_cast<const double*>(stats.data_ptr()),
        static_cast<const T*>(grad.data_ptr()), grad_lse ? static_cast<const double*>(grad_lse->data_ptr()) : nullptr,
        static_cast<T*>(dq.data_ptr()), token_grads ? static_cast<T*>(dfeat.data_ptr()) : nullptr,
        token_grads ? static_cast<T*>(dscale.data_ptr()) : nullptr, torch_parallel());
  };
  if (q.scalar_type() == ScalarType::Double) run(0.0);
  else run(0.0f);
  return {dq, dfeat, dscale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CPU, m) {
  m.impl("grid_attention_forward", TORCH_BOX(&forward));
  m.impl("grid_attention_backward", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
