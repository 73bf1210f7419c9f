// Cross-attention of a few latents to keys and values that exist, with the latents' LayerNorm, both projections and the
// residual, on the CPU and free of torch. See perceiver_fast/ops/latent_cross_attention.py for the maths.
//
// B batch elements of N latents of D channels; M tokens; H heads of d channels, I = H d. T is float or double. All arrays
// are dense.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "parallel.h"

namespace perceiver_fast {

// Parameters, or (X = T) their gradients.
template <class X>
struct LatentCrossAttentionParameters {
  X *norm_weight, *norm_bias;  // [D]
  X* to_q;                     // [I, D]
  X *to_out, *to_out_bias;     // [D, I] and [D]
};

template <class T>
struct LatentCrossAttention {
  int64_t batch, x_batch;  // x_batch is 1 where the whole batch shares the latents
  int64_t latents, channels, tokens, heads, inner;
  bool adds;                // whether the latents are added to the result
  double logit_scale, eps;  // of the latents' LayerNorm, more than 0
  Dropout dropout;          // of weights
  const T* x;               // [x_batch, N, D]
  const T* keys_values;     // [B, M, 2 I], keys first
  const uint8_t* mask;      // [B, M] or null
  LatentCrossAttentionParameters<const T> parameters;
};

// What the forward makes beside y, and the backward needs.
template <class T>
struct LatentCrossAttentionSaved {
  T* q;         // [x_batch, H, N, d]
  T* o;         // [B, H, N, d]
  double* lse;  // [B, H, N]
  T* rest;      // latent_cross_attention_rest numbers
};

template <class T>
int64_t latent_cross_attention_rest(const LatentCrossAttention<T>& call);

// y [B, N, D].
template <class T>
void latent_cross_attention_forward(const LatentCrossAttention<T>& call, T* y,
                                    const LatentCrossAttentionSaved<T>& saved, const Parallel& parallel);

// d_x [x_batch, N, D], d_keys_values [B, M, 2 I] and the gradients of the parameters.
template <class T>
void latent_cross_attention_backward(const LatentCrossAttention<T>& call, const T* d_y,
                                     const LatentCrossAttentionSaved<T>& saved, T* d_x, T* d_keys_values,
                                     const LatentCrossAttentionParameters<T>& gradients, const Parallel& parallel);

}  // namespace perceiver_fast
