// Grid attention on the CPU: the drivers, free of torch. See perceiver_fast/ops/grid_attention.py for the maths.
//
// B batch, N queries (heads folded in), M tokens on a grid of the given sizes, F raw channels,
// L = F + sum(sizes). T is float or double. All arrays are dense and row-major.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel.h"

namespace perceiver_fast {

template <class T>
struct GridAttentionInput {
  int64_t batch, queries, features;
  std::vector<int64_t> sizes;
  const T* q;              // [B, N, L]: q_feat, then q_axes joined
  int64_t q_batch_stride;  // N * L, or 0 when the whole batch shares its queries
  const T* feat;           // [B, M, F]
  const T* scale;          // [B, M]
  const uint8_t* mask;     // [B, M] or null
};

// o [B, N, L], lse [B, N] (natural logarithm; double because logits of 1e4 leave a float lse four digits).
template <class T>
void grid_attention_forward(const GridAttentionInput<T>& in, T* o, double* lse, const Parallel& parallel);

// dq [B, N, L]; dfeat [B, M, F] and dscale [B, M] are computed unless null. dlse [B, N] may be null.
template <class T>
void grid_attention_backward(const GridAttentionInput<T>& in, const T* o, const double* lse, const T* d_o,
                             const double* d_lse, T* dq, T* dfeat, T* dscale, const Parallel& parallel);

}  // namespace perceiver_fast
