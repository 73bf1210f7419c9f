// torch operators perceiver_fast::grid_query_attention_{forward,into,backward} for CPU tensors, on torch's stable
// ABI: attention of the queries of a grid, feat [B or 1, *sizes, F], or of points, [B or 1, M, F], to keys whose
// tables are [B, H, N, L]; csrc/core computes. perceiver_fast/ops/grid_query_attention.py defines the schemas.
// Threads are torch's. Operands that are not dense are copied.
#include "../core/grid_query_attention.h"

#include <algorithm>
#include <tuple>

#include "checks.h"

namespace perceiver_fast {
namespace {

constexpr Check check{"grid_query_attention"};

// Dense inputs, alive as long as the raw pointers taken from them.
struct Inputs {
  Dropout dropout;
  bool sum_heads;
  Shape sizes;      // of the axes; empty for points
  int64_t queries;  // M
  Tensor tables, feat, v;
  std::optional<Tensor> scale, bias, mask;

  Inputs(const Tensor& tables_, const Tensor& feat_, const std::optional<Tensor>& scale_,
         const std::optional<Tensor>& bias_, const Tensor& v_, const std::optional<Tensor>& mask_, bool grid,
         double probability, const std::optional<Tensor>& seed, bool sum_heads_)
      : dropout(check.dropout(probability, seed)), sum_heads(sum_heads_) {
    const ScalarType dtype = check.floating("tables", tables_);
    check.dtype("feat", feat_, dtype);
    check.dtype("scale", scale_, dtype);
    check.dtype("bias", bias_, dtype);
    check.dtype("v", v_, dtype);
    check.dtype("mask", mask_, ScalarType::Bool);
    check.rank("tables", tables_, 4, "[B, H, N, L]");
    check.rank("v", v_, 4, "[B, H, N, C]");
    Shape shape = sizes_of(feat_);  // [B or 1, *sizes], when F is taken off
    STD_TORCH_CHECK(grid ? shape.size() >= 3 && shape.size() - 2 <= 64 : shape.size() == 3, check.op, ": expected feat ",
                    grid ? "[B, *sizes, F] of 1 to 64 axes" : "[B, M, F]", ", got shape ", text_of(shape));
    const int64_t features = shape.back(), B = tables_.size(0), H = tables_.size(1), N = tables_.size(2);
    shape.pop_back();
    const Shape axes(shape.begin() + 1, shape.end());
    Shape entries{features};
    if (grid) {
      for (int64_t size : axes)
        STD_TORCH_CHECK(size > 0, check.op, ": expected a grid without empty axes, got sizes ", text_of(axes));
      sizes = axes;
      entries.insert(entries.end(), axes.begin(), axes.end());
    }
    STD_TORCH_CHECK(shape[0] == B || shape[0] == 1, check.op, ": expected feat of tables' batch size ", B,
                    " or of one, got ", shape[0]);
    STD_TORCH_CHECK(H > 0 && N > 0, check.op, ": expected at least one head and one key, got tables of shape ",
                    text_of(sizes_of(tables_)));
    STD_TORCH_CHECK(v_.size(3) > 0, check.op, ": expected v of at least one channel, got none");
    queries = check.product("queries", axes);
    check.product("outputs", {B, H, queries, v_.size(3)});
    check.product("elements of feat", {B, queries, features});
    check.shape("tables", tables_, {B, H, N, check.sum("entries of a key", entries)},
                grid ? "[B, H, N, F + sum(sizes)]" : "[B, H, N, F]");
    check.shape("scale", scale_, shape, grid ? "[B, *sizes] like feat" : "[B, M] like feat");
    check.shape("bias", bias_, {B, H, N}, "[B, H, N]");
    check.shape("v", v_, {B, H, N, v_.size(3)}, "[B, H, N, C]");
    check.shape("mask", mask_, {B, N}, "[B, N]");
    tables = dense(tables_);
    feat = dense(feat_);
    v = dense(v_);
    if (scale_) scale = dense(*scale_);
    if (bias_) bias = dense(*bias_);
    if (mask_) mask = dense(*mask_);
  }

  bool empty() const { return tables.size(0) == 0 || queries == 0; }
  Shape outputs() const {
    if (sum_heads) return {tables.size(0), queries, v.size(3)};
    return {tables.size(0), queries, tables.size(1), v.size(3)};
  }
  Shape rows() const { return {tables.size(0), tables.size(1), queries}; }
  // Of gradients of feat and of scale: every batch element its own.
  Shape feat_shape() const {
    Shape shape = sizes_of(feat);
    shape[0] = tables.size(0);
    return shape;
  }
  Shape scale_shape() const {
    Shape shape = feat_shape();
    shape.pop_back();
    return shape;
  }

  template <class T>
  GridQueryInput<T> view() const {
    GridQueryInput<T> in;
    const int64_t features = feat.size(feat.dim() - 1);
    const bool shared = feat.size(0) == 1;
    in.batch = tables.size(0);
    in.heads = tables.size(1);
    in.keys = tables.size(2);
    in.queries = queries;
    in.features = features;
    in.channels = v.size(3);
    in.sizes = sizes;
    in.tables = data<const T>(tables);
    in.feat = features == 0 ? nullptr : data<const T>(feat);
    in.scale = data<const T>(scale);
    in.feat_batch_stride = shared ? 0 : queries * features;
    in.scale_batch_stride = shared ? 0 : queries;
    in.bias = data<const T>(bias);
    in.v = data<const T>(v);
    in.mask = data<const uint8_t>(mask);
    in.dropout = dropout;
    in.sum_heads = sum_heads;
    return in;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& tables, const Tensor& feat, const std::optional<Tensor>& scale,
                                   const std::optional<Tensor>& bias, const Tensor& v,
                                   const std::optional<Tensor>& mask, bool grid, double dropout,
                                   const std::optional<Tensor>& seed, bool sum_heads, bool need_lse) {
  const Inputs inputs(tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads);
  Tensor o = torch::stable::new_empty(tables, inputs.outputs());
  Tensor lse = torch::stable::new_empty(tables, need_lse ? inputs.rows() : Shape{0}, ScalarType::Double);
  if (inputs.empty()) return {o, lse};
  with_type(tables, [&](auto zero) {
    using T = decltype(zero);
    grid_query_attention_forward<T>(inputs.view<T>(), data<T>(o), o.stride(0), need_lse ? data<double>(lse) : nullptr,
                                    torch_parallel());
  });
  return {o, lse};
}

// Whether the elements of the batch are dense and apart from one another, so that results can be written there.
bool dense_elements(const Tensor& t) {
  int64_t size = 1;
  for (int64_t axis = t.dim() - 1; axis > 0; size *= t.size(axis--))
    if (t.size(axis) != 1 && t.stride(axis) != size) return false;
  return t.size(0) == 1 || t.stride(0) >= size;
}

// The forward's o, written into a tensor that is there.
void into(const Tensor& out, const Tensor& tables, const Tensor& feat, const std::optional<Tensor>& scale,
          const std::optional<Tensor>& bias, const Tensor& v, const std::optional<Tensor>& mask, bool grid,
          double dropout, const std::optional<Tensor>& seed, bool sum_heads) {
  const Inputs inputs(tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads);
  check.dtype("out", out, tables.scalar_type());
  check.shape("out", out, inputs.outputs(), sum_heads ? "[B, M, C]" : "[B, M, H, C]");
  if (inputs.empty()) return;
  const bool direct = dense_elements(out);
  Tensor o = direct ? out : torch::stable::new_empty(tables, inputs.outputs());
  with_type(tables, [&](auto zero) {
    using T = decltype(zero);
    grid_query_attention_forward<T>(inputs.view<T>(), data<T>(o), o.stride(0), nullptr, torch_parallel());
  });
  Tensor given = out;  // the same memory
  if (!direct) torch::stable::copy_(given, o);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& d_o, const Tensor& tables, const Tensor& feat, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& bias, const Tensor& v, const std::optional<Tensor>& mask, bool grid, double dropout,
    const std::optional<Tensor>& seed, bool sum_heads, const Tensor& lse, bool token_grads) {
  const Inputs inputs(tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads);
  const Tensor grad =
      check.dense("d_o", d_o, tables.scalar_type(), inputs.outputs(), sum_heads ? "[B, M, C]" : "[B, M, H, C]");
  const Tensor stats = check.dense("lse", lse, ScalarType::Double, inputs.rows(), "[B, H, M]");
  const auto like = [&](bool there, const Shape& shape) {
    return torch::stable::new_empty(tables, there ? shape : Shape{0});
  };
  const bool scale_grad = token_grads && inputs.scale;
  Tensor d_tables = like(true, sizes_of(tables)), d_feat = like(token_grads, inputs.feat_shape());
  Tensor d_scale = like(scale_grad, inputs.scale_shape());
  Tensor d_bias = like(inputs.bias.has_value(), {tables.size(0), tables.size(1), tables.size(2)});
  Tensor d_v = like(true, sizes_of(v));
  with_type(tables, [&](auto zero) {
    using T = decltype(zero);
    if (inputs.empty()) {  // without queries the keys' gradients are zero
      for (const Tensor* t : {&d_tables, &d_bias, &d_v}) std::fill_n(data<T>(*t), t->numel(), T(0));
      return;
    }
    grid_query_attention_backward<T>(inputs.view<T>(), data<const T>(grad), data<const double>(stats),
                                     {data<T>(d_tables), token_grads ? data<T>(d_feat) : nullptr,
                                      scale_grad ? data<T>(d_scale) : nullptr,
                                      inputs.bias ? data<T>(d_bias) : nullptr, data<T>(d_v)},
                                     torch_parallel());
  });
  return {d_tables, d_feat, d_scale, d_bias, d_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CPU, m) {
  m.impl("grid_query_attention_forward", TORCH_BOX(&forward));
  m.impl("grid_query_attention_into", TORCH_BOX(&into));
  m.impl("grid_query_attention_backward", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
