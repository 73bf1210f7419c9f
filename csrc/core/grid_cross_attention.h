// Cross-attention of a few latents to the tokens of a grid, or of no axis, with LayerNorm of both sides and all projections, on the CPU
// and free of torch. See perceiver_fast/ops/grid_cross_attention.py for the maths.
//
// B batch elements of N latents of D channels; M tokens of C channels; H heads of d channels, I = H d; L = F + sum(sizes).
// F counts raw channels, or these less their mean and the mean. T is float or double. All arrays are dense.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "dropout.h"
#include "parallel.h"

namespace perceiver_fast {

// Parameters, or (X = T) their gradients.
template <class X>
struct GridCrossAttentionParameters {
  X *norm_weight, *norm_bias;        // [D]
  X* to_q;                           // [I, D]
  X *context_weight, *context_bias;  // [C]
  X* to_kv;                          // [2 I, C], keys first
  X *to_out, *to_out_bias;           // [D, I] and [D]
};

template <class T>
struct GridCrossAttention {
  int64_t batch, x_batch;  // x_batch is 1 where the whole batch shares the latents
  int64_t latents, channels;
  int64_t heads, inner, features, context_channels;
  std::vector<int64_t> sizes;
  double logit_scale, eps;  // of the latents' LayerNorm, more than 0
  const T* x;               // [x_batch, N, D]
  const T *feat, *scale;    // [B, M, F] and [B, M]; of no axis tokens that are normalised already, and null
  int64_t tokens;           // M
  const uint8_t* mask;      // [B, M] or null
  Dropout dropout{0, 0};    // of a grid's weights
  std::vector<const T*> codes;         // [n_a, C_a] of every axis
  std::vector<int64_t> code_channels;  // C_a
  GridCrossAttentionParameters<const T> parameters;

  int64_t raw_channels() const {  // `features`, or one less where the last is the mean
    return context_channels - std::accumulate(code_channels.begin(), code_channels.end(), int64_t(0));
  }
};

// What the forward makes beside y, and the backward needs.
template <class T>
struct GridCrossAttentionSaved {
  T* q;         // [x_batch, H N, L]; of no axis L = C
  T* o;         // [B, H N, L]
  double* lse;  // [B, H N]
  T* kept;      // [B, H N]: with dropout the sums of weights that it keeps, else null
  T* rest;      // grid_cross_attention_rest numbers
};

template <class T>
int64_t grid_cross_attention_rest(const GridCrossAttention<T>& call);

// y [B, N, D]: the latents with what they attended to.
template <class T>
void grid_cross_attention_forward(const GridCrossAttention<T>& call, T* y, const GridCrossAttentionSaved<T>& saved,
                                  const Parallel& parallel);

// d_x [x_batch, N, D] and the gradients of the parameters.
template <class T>
void grid_cross_attention_backward(const GridCrossAttention<T>& call, const T* d_y,
                                   const GridCrossAttentionSaved<T>& saved, T* d_x,
                                   const GridCrossAttentionParameters<T>& gradients, const Parallel& parallel);

}  // namespace perceiver_fast
