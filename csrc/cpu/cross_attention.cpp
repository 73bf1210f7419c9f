// torch operators perceiver_fast::cross_attention_{forward,backward} for CPU tensors, on torch's stable ABI: o =
// softmax(scale q k^T) v with q [B, H, N, d], k [B, H, M, d], v [B, H, M, dv] and a mask [B, M]; csrc/core computes.
// Shapes and dtypes are checked here. Threads are torch's. Operands whose channels are not dense are copied.
#include "../core/cross_attention.h"

#include <tuple>

#include "dtypes.h"

namespace perceiver_fast {
namespace {

constexpr Check check{"cross_attention"};

// Of a tensor whose channels are dense.
template <class X>
HeadMatrix<X> matrix(const Tensor& t) {
  return {data<X>(t), t.stride(0), t.stride(1), t.stride(2)};
}

struct Inputs {
  Tensor q, k, v;
  std::optional<Tensor> mask;
  double scale;
  Dropout dropout;
  bool inverted;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& mask_, double scale_,
         double probability, const std::optional<Tensor>& seed, bool inverted_)
      : scale(scale_), dropout(check.dropout(probability, seed)), inverted(inverted_) {
    const ScalarType dtype = check.floating_or_bfloat16("q", q_);
    check.dtype("k", k_, dtype);
    check.dtype("v", v_, dtype);
    check.dtype("mask", mask_, ScalarType::Bool);
    check.rank("q", q_, 4, "[B, H, N, d]");
    check.rank("k", k_, 4, "[B, H, M, d]");
    check.rank("v", v_, 4, "[B, H, M, dv]");
    const int64_t B = q_.size(0), H = q_.size(1), M = k_.size(2), d = q_.size(3);
    STD_TORCH_CHECK(d > 0, "cross_attention: expected q of at least one channel, got none");
    STD_TORCH_CHECK(M > 0, "cross_attention: expected at least one token, got k of shape ", text_of(sizes_of(k_)));
    check.shape("k", k_, {B, H, M, d}, "[B, H, M, d] with q's B, H and d");
    check.shape("v", v_, {B, H, M, v_.size(3)}, "[B, H, M, dv] with q's B and H, k's M");
    check.shape("mask", mask_, {B, M}, "[B, M]");
    STD_TORCH_CHECK(std::isfinite(scale), "cross_attention: expected a finite scale, got ", scale);
    for (const Tensor* rows : {&q_, &k_, &v_}) check.product("rows", {B, H, rows->size(2)});
    q = dense_rows(q_);
    k = dense_rows(k_);
    v = dense_rows(v_);
    if (mask_) mask = dense(*mask_);
  }

  bool empty() const { return q.size(0) == 0 || q.size(1) == 0; }

  static Tensor dense_rows(const Tensor& t) {
    return t.size(3) == 1 || t.stride(3) == 1 ? t : dense(t);
  }

  template <class X>
  CrossAttentionInput<X> view() const {
    return {q.size(0), q.size(1),    q.size(2),    k.size(2),    q.size(3),
            v.size(3), matrix<const X>(q), matrix<const X>(k), matrix<const X>(v), data<const uint8_t>(mask),
            scale,     dropout,      inverted};
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const std::optional<Tensor>& mask, double scale, double dropout,
                                           const std::optional<Tensor>& seed, bool inverted) {
  const Inputs inputs(q, k, v, mask, scale, dropout, seed, inverted);
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), M = k.size(2);
  // Rows of heads beside one another in memory, as what comes before and after attention has them.
  Tensor o = empty_middle_swapped({B, H, N, v.size(3)}, compute_dtype(q.scalar_type()));
  Tensor lse = torch::stable::new_empty(q, {B, H, N}, ScalarType::Double);
  Tensor token_lse = torch::stable::new_empty(
      q, inverted ? Shape{B, H, M} : Shape{0}, ScalarType::Double);
  if (inputs.empty()) return {o, lse, token_lse};
  with_numbers(q, [&](auto zero) {
    using X = decltype(zero);
    cross_attention_forward<X>(inputs.view<X>(), matrix<ComputeOf<X>>(o), data<double>(lse), data<double>(token_lse),
                               torch_parallel());
  });
  return {o, lse, token_lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_o, const std::optional<Tensor>& d_lse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                                            double scale, double dropout, const std::optional<Tensor>& seed,
                                            bool inverted, const Tensor& o, const Tensor& lse,
                                            const Tensor& token_lse, bool to_tokens) {
  const Inputs inputs(q, k, v, mask, scale, dropout, seed, inverted);
  const ScalarType dtype = q.scalar_type();
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), M = k.size(2);
  const Shape rows{B, H, N}, outputs{B, H, N, v.size(3)}, columns{B, H, M};
  check.dtype("d_o", d_o, dtype);
  check.shape("d_o", d_o, outputs, "[B, H, N, dv]");
  check.dtype("o", o, compute_dtype(dtype));
  check.shape("o", o, outputs, "[B, H, N, dv]");
  const Tensor grad = Inputs::dense_rows(d_o), out = Inputs::dense_rows(o);
  const Tensor stats = check.dense("lse", lse, ScalarType::Double, rows, "[B, H, N]");
  const auto grad_lse = check.dense("d_lse", d_lse, ScalarType::Double, rows, "[B, H, N]");
  const Tensor token_stats = check.dense("token_lse", token_lse, ScalarType::Double, inverted ? columns : Shape{0},
                                         inverted ? "[B, H, M]" : "empty");
  Tensor dq = empty_middle_swapped(sizes_of(q), dtype);
  Tensor dk = torch::stable::new_empty(k, to_tokens ? sizes_of(k) : Shape{0});
  Tensor dv = torch::stable::new_empty(v, to_tokens ? sizes_of(v) : Shape{0});
  if (inputs.empty()) return {dq, dk, dv};
  with_numbers(q, [&](auto zero) {
    using X = decltype(zero);
    HeadMatrix<X> to_k{}, to_v{};
    if (to_tokens) {
      to_k = dense_heads(data<X>(dk), k.size(1), k.size(2), k.size(3));
      to_v = dense_heads(data<X>(dv), v.size(1), v.size(2), v.size(3));
    }
    cross_attention_backward<X>(inputs.view<X>(), matrix<const ComputeOf<X>>(out), data<const double>(stats),
                                data<const double>(token_stats), matrix<const X>(grad), data<const double>(grad_lse),
                                matrix<X>(dq), to_k, to_v, torch_parallel());
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CPU, m) {
  m.impl("cross_attention_forward", TORCH_BOX(&forward));
  m.impl("cross_attention_backward", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
