// torch operators perceiver_fast::cross_attention_{forward,backward} for CPU tensors, on torch's stable ABI: o =
// softmax(scale q k^T) v with q [B, H, N, d], k [B, H, M, d], v [B, H, M, dv] and a mask [B, M]; csrc/core computes.
// Shapes and dtypes are checked here. Threads are torch's. Operands whose channels are not dense are copied.
#include "../core/cross_attention.h"

#include <tuple>

#include "torch_stable.h"

namespace perceiver_fast {
namespace {

struct Inputs {
  Tensor q, k, v;
  std::optional<Tensor> mask;
  double scale;
  Dropout dropout;
  bool inverted;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& mask_, double scale_,
         double probability, const std::optional<Tensor>& seed, bool inverted_)
      : q(dense_rows(q_)), k(dense_rows(k_)), v(dense_rows(v_)), scale(scale_), dropout(dropout_of(probability, seed)),
        inverted(inverted_) {
    const auto dtype = q.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                    "cross_attention: expected float32 or float64");
    STD_TORCH_CHECK(k.scalar_type() == dtype && v.scalar_type() == dtype,
                    "cross_attention: expected q, k and v of one dtype");
    STD_TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(1) == q.size(1) &&
                        v.size(1) == q.size(1),
                    "cross_attention: expected q, k and v of one batch size and number of heads");
    STD_TORCH_CHECK(k.size(3) == q.size(3) && v.size(2) == k.size(2),
                    "cross_attention: expected k of q's channels and v of k's tokens");
    STD_TORCH_CHECK(k.size(2) > 0, "cross_attention: expected at least one token");
    if (mask_) {
      STD_TORCH_CHECK(mask_->scalar_type() == ScalarType::Bool && mask_->dim() == 2 && mask_->size(0) == q.size(0) &&
                          mask_->size(1) == k.size(2),
                      "cross_attention: expected a bool mask [B, M]");
      mask = torch::stable::contiguous(*mask_);
    }
  }

  static Tensor dense_rows(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 4, "cross_attention: expected [B, H, rows, channels], got ", t.dim(), " dimensions");
    return t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
  }

  template <class T>
  static HeadMatrix<T> matrix(const Tensor& t) {
    return {data<const T>(t), t.stride(0), t.stride(1), t.stride(2)};
  }

  template <class T>
  CrossAttentionInput<T> view() const {
    return {q.size(0), q.size(1),    q.size(2),    k.size(2),    q.size(3),
            v.size(3), matrix<T>(q), matrix<T>(k), matrix<T>(v), data<const uint8_t>(mask),
            scale,     dropout,      inverted};
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const std::optional<Tensor>& mask, double scale, double dropout,
                                           const std::optional<Tensor>& seed, bool inverted) {
  const Inputs inputs(q, k, v, mask, scale, dropout, seed, inverted);
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), M = k.size(2);
  Tensor o = torch::stable::new_empty(q, {B, H, N, v.size(3)});
  Tensor lse = torch::stable::new_empty(q, {B, H, N}, ScalarType::Double);
  Tensor token_lse = torch::stable::new_empty(
      q, inverted ? std::vector<int64_t>{B, H, M} : std::vector<int64_t>{0}, ScalarType::Double);
  with_type(q, [&](auto zero) {
    using T = decltype(zero);
    cross_attention_forward<T>(inputs.view<T>(), data<T>(o), data<double>(lse), data<double>(token_lse),
                               torch_parallel());
  });
  return {o, lse, token_lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_o, const std::optional<Tensor>& d_lse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                                            double scale, double dropout, const std::optional<Tensor>& seed,
                                            bool inverted, const Tensor& o, const Tensor& lse,
                                            const Tensor& token_lse) {
  const Inputs inputs(q, k, v, mask, scale, dropout, seed, inverted);
  STD_TORCH_CHECK(!d_lse || !inverted, "cross_attention: inverted attention's lse has no gradient");
  for (const Tensor* t : {&d_o, &o})
    STD_TORCH_CHECK(t->dim() == 4 && t->size(0) == q.size(0) && t->size(1) == q.size(1) && t->size(2) == q.size(2) &&
                        t->size(3) == v.size(3) && t->scalar_type() == q.scalar_type(),
                    "cross_attention: expected o and its gradient [B, H, N, dv] of q's dtype");
  const auto statistics = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 3 && t.scalar_type() == ScalarType::Double && t.size(0) == q.size(0) &&
                        t.size(1) == q.size(1) && t.size(2) == q.size(2),
                    "cross_attention: expected ", name, " [B, H, N] float64");
    return torch::stable::contiguous(t);
  };
  const Tensor grad = torch::stable::contiguous(d_o), out = torch::stable::contiguous(o);
  const Tensor stats = statistics(lse, "lse"), token_stats = torch::stable::contiguous(token_lse);
  STD_TORCH_CHECK(!inverted || (token_lse.scalar_type() == ScalarType::Double &&
                                token_lse.numel() == k.size(0) * k.size(1) * k.size(2)),
                  "cross_attention: expected token_lse [B, H, M] float64");
  std::optional<Tensor> grad_lse;
  if (d_lse) grad_lse = statistics(*d_lse, "d_lse");
  Tensor dq = torch::stable::new_empty(q, sizes_of(q)), dk = torch::stable::new_empty(k, sizes_of(k));
  Tensor dv = torch::stable::new_empty(v, sizes_of(v));
  with_type(q, [&](auto zero) {
    using T = decltype(zero);
    cross_attention_backward<T>(inputs.view<T>(), data<const T>(out), data<const double>(stats),
                                data<const double>(token_stats), data<const T>(grad), data<const double>(grad_lse),
                                data<T>(dq), data<T>(dk), data<T>(dv), torch_parallel());
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CPU, m) {
  m.impl("cross_attention_forward", TORCH_BOX(&forward));
  m.impl("cross_attention_backward", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
