// Grid attention on the CPU: the drivers, free of torch. See perceiver_fast/ops/grid_attention.py for the maths.
//
// B batch, N queries (heads folded in), M tokens on a grid of the given sizes, F raw channels,
// L = F + sum(sizes). T is float or double. All arrays are dense and row-major.
#pragma once

#include <cstdint>
#include <vector>

#include "dropout.h"
#include "parallel.h"

namespace perceiver_fast {

template <class T>
struct GridAttentionInput {
  int64_t batch, queries, features;
  int64_t heads;  // consecutive batch elements with the same tokens and mask: the heads of inverted attention; else 1
  std::vector<int64_t> sizes;
  const T* q;              // [B, N, L]: q_feat, then q_axes joined
  int64_t q_batch_stride;  // N * L, or 0 when the whole batch shares its queries
  const T* feat;           // [B / heads, M, F]
  const T* scale;          // [B / heads, M]
  const uint8_t* mask;     // [B / heads, M] or null
  Dropout dropout{0, 0};
  bool inverted = false;   // softmax over the queries, then normalised over the tokens
};

template <class T>
struct GridAttentionOutput {
  T* o;               // [B, N, L]
  double* lse;        // [B, N]: natural logarithm; double because logits of 1e4 leave a float lse four digits.
                      // kEmptyLse where all is masked, but for inverted attention
  T* kept;            // [B, N]: sum of the weights that dropout keeps, with dropout or inverted; else null
  double* token_lse;  // [B, M]: of inverted attention's softmax over the queries; else null
};

template <class T>
void grid_attention_forward(const GridAttentionInput<T>& in, const GridAttentionOutput<T>& out,
                            const Parallel& parallel);

// Gradients of the outputs; those of lse and of kept may be null.
template <class T>
struct GridAttentionGradient {
  const T* o;         // [B, N, L]
  const double* lse;  // [B, N]
  const T* kept;      // [B, N]
};

// dq [B, N, L]; dfeat [B, M, F] and dscale [B, M] (every head its own) are computed unless null.
template <class T>
void grid_attention_backward(const GridAttentionInput<T>& in, const GridAttentionOutput<T>& out,
                             const GridAttentionGradient<T>& grad, T* dq, T* dfeat, T* dscale,
                             const Parallel& parallel);

}  // namespace perceiver_fast
