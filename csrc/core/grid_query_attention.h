// Attention of many queries on a grid, or at points, to few keys: the drivers, free of torch. See
// perceiver_fast/ops/grid_query_attention.py for the maths.
//
// B batch, H heads, N keys, M queries, F raw channels, C channels of values. L = F + sum(sizes) on a grid, F for
// points. T is float or double. Arrays are dense and row-major unless a stride is given.
#pragma once

#include <cstdint>
#include <vector>

#include "dropout.h"
#include "parallel.h"

namespace perceiver_fast {

template <class T>
struct GridQueryInput {
  int64_t batch, heads, keys, queries, features, channels;
  std::vector<int64_t> sizes;  // of the grid's axes; empty for points
  const T* tables;             // [B, H, N, L]
  const T* feat;               // [B, M, F]; null without channels
  const T* scale;              // [B, M], or null: one
  int64_t feat_batch_stride, scale_batch_stride;  // M F and M, or 0 when the whole batch shares its queries
  const T* bias;               // [B, H, N], or null: zero
  const T* v;                  // [B, H, N, C]
  const uint8_t* mask;         // [B, N] or null
  Dropout dropout{0, 0};
  bool sum_heads;              // add the heads' outputs up
};

// o [B, M, H, C], or [B, M, C] with sum_heads, batch elements o_batch_stride apart; lse [B, H, M] (the natural
// logarithm; kEmptyLse where all keys are masked) may be null.
template <class T>
void grid_query_attention_forward(const GridQueryInput<T>& in, T* o, int64_t o_batch_stride, double* lse,
                                  const Parallel& parallel);

// Like the inputs, but feat and scale, which are [B, M, F] and [B, M] even where the batch shares its queries. Null
// where a gradient is not wanted, but tables and v.
template <class T>
struct GridQueryGradients {
  T *tables, *feat, *scale, *bias, *v;
};

// d_o is like o, and dense.
template <class T>
void grid_query_attention_backward(const GridQueryInput<T>& in, const T* d_o, const double* lse,
                                   const GridQueryGradients<T>& grads, const Parallel& parallel);

}  // namespace perceiver_fast
