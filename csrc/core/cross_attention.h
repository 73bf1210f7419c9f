// Streaming attention over keys and values that exist as tensors, on the CPU: the drivers, free of torch.
// See perceiver_fast/ops/cross_attention.py for the maths.
//
// B batch, H heads, N queries, M tokens, d channels of queries and keys, dv of values. T is float or double.
#pragma once

#include <cstdint>

#include "dropout.h"
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

template <class T>
struct CrossAttentionInput {
  int64_t batch, heads, queries, tokens, dim, dim_v;
  HeadMatrix<const T> q, k, v;
  const uint8_t* mask;  // [B, M] or null; without inverted, a row of zeros attends uniformly
  double scale;         // of the logits
  Dropout dropout;
  bool inverted;        // softmax over the queries, then normalised over the tokens
};

// Normal:   P = exp(S - lse[n]).                    token_lse is not touched.
//           A batch element that is all masked attends uniformly, and its lse is kEmptyLse.
// Inverted: P = exp(S - token_lse[m] - lse[n]) with lse the logarithm of the (clamped) normaliser over the tokens.
// o [B, H, N, dv] dense, lse [B, H, N], token_lse [B, H, M].
template <class T>
void cross_attention_forward(const CrossAttentionInput<T>& in, T* o, double* lse, double* token_lse,
                             const Parallel& parallel);

// dq [B, H, N, d] dense, dk [B, H, M, d] and dv [B, H, M, dv], or null both where nobody needs them. d_lse [B, H, N] may be
// null.
template <class T>
void cross_attention_backward(const CrossAttentionInput<T>& in, const T* o, const double* lse, const double* token_lse,
                              const T* d_o, const double* d_lse, T* dq, const HeadMatrix<T>& dk,
                              const HeadMatrix<T>& dv, const Parallel& parallel);

}  // namespace perceiver_fast
