// Streaming attention over keys and values that exist as tensors, on the CPU: the drivers, free of torch.
// See perceiver_fast/ops/cross_attention.py for the maths.
//
// B batch, H heads, N queries, M tokens, d channels of queries and keys, dv of values. X is float, double or BFloat16, T
// what is computed in: float or double.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "pairs.h"
#include "parallel.h"

namespace perceiver_fast {

// [B, H, rows, channels] with channels dense, read (X = const T) or written.
template <class X>
struct HeadMatrix {
  X* data;
  int64_t batch_stride, head_stride, row_stride;
  X* at(int64_t b, int64_t h, int64_t row) const {
    return data + b * batch_stride + h * head_stride + row * row_stride;
  }
};

// Of a dense [B, H, rows, channels].
template <class X>
HeadMatrix<X> dense_heads(X* data, int64_t heads, int64_t rows, int64_t channels) {
  return {data, heads * rows * channels, rows * channels, channels};
}

template <class X>
struct CrossAttentionInput {
  int64_t batch, heads, queries, tokens, dim, dim_v;
  HeadMatrix<const X> q, k, v;
  const uint8_t* mask;  // [B, M] or null; without inverted, a row of zeros attends uniformly
  double scale;         // of the logits
  Dropout dropout;
  bool inverted;        // softmax over the queries, then normalised over the tokens
};

// A call's dense [B, H, N, d], such as dq, and [B, H, N, dv], such as o.
template <class Y, class X>
HeadMatrix<Y> dense_queries(const CrossAttentionInput<X>& in, Y* data) {
  return dense_heads(data, in.heads, in.queries, in.dim);
}
template <class Y, class X>
HeadMatrix<Y> dense_outputs(const CrossAttentionInput<X>& in, Y* data) {
  return dense_heads(data, in.heads, in.queries, in.dim_v);
}

// Normal:   P = exp(S - lse[n]).                    token_lse is not touched.
//           A batch element that is all masked attends uniformly, and its lse is kEmptyLse.
// Inverted: P = exp(S - token_lse[m] - lse[n]) with lse the logarithm of the (clamped) normaliser over the tokens.
// o [B, H, N, dv], lse [B, H, N], token_lse [B, H, M].
//
// BFloat16: logits and sums are float. Where pairs are multiplied (takes_pairs in cross_attention_pairs.h), weights are rounded
// to bfloat16, and lse is that of the rounded weights, so that those of a query add up to one; else all is computed in float.
template <class X>
void cross_attention_forward(const CrossAttentionInput<X>& in, const HeadMatrix<ComputeOf<X>>& o, double* lse,
                             double* token_lse, const Parallel& parallel);

// dq [B, H, N, d], dk [B, H, M, d] and dv [B, H, M, dv], or null both where nobody needs them. d_lse [B, H, N] may be
// null.
template <class X>
void cross_attention_backward(const CrossAttentionInput<X>& in, const HeadMatrix<const ComputeOf<X>>& o,
                              const double* lse, const double* token_lse, const HeadMatrix<const X>& d_o,
                              const double* d_lse, const HeadMatrix<X>& dq, const HeadMatrix<X>& dk,
                              const HeadMatrix<X>& dv, const Parallel& parallel);

}  // namespace perceiver_fast
