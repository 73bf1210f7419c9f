// A few latents through pre-normalised layers, self-attention and feed-forward, on the CPU and free of torch. See
// perceiver_fast/ops/latent_layers.py for the maths.
//
// B batch elements of N latents of D channels, dense [B, N, D]. T is float or double.
#pragma once

#include <cstdint>
#include <vector>

#include "dropout.h"
#include "parallel.h"

namespace perceiver_fast {

// Six parameters of a layer, or (X = T) their gradients. A layer with heads is attention, one without a feed-forward.
//
//               attention                      feed-forward
//   first       to_q [I, D]                    [2 F, D], values then gates
//   second      to_kv [2 I, D], keys first     its bias [2 F]
//   last        to_out [D, I]                  [D, F]
template <class X>
struct LatentLayerParameters {
  X *norm_weight, *norm_bias, *first, *second, *last, *last_bias;
};

template <class T>
struct LatentLayer {
  int64_t heads;  // 0: a feed-forward
  int64_t inner;  // channels of all heads together, I; or the feed-forward's width, F
  double scale;   // of the logits
  double eps;     // of LayerNorm, more than 0
  LatentLayerParameters<const T> parameters;
  Dropout dropout;  // of attention's weights
  const T* noise;   // [B, N, D] that dropout multiplies what a feed-forward adds with, or null
};

template <class T>
struct LatentLayers {
  int64_t batch, latents, channels;
  std::vector<LatentLayer<T>> layers;
};

// How many numbers of T the forward saves for the backward.
template <class T>
int64_t latent_layers_saved(const LatentLayers<T>& call);

// y [B, N, D] from x; `saved` may be null.
template <class T>
void latent_layers_forward(const LatentLayers<T>& call, const T* x, T* y, T* saved, const Parallel& parallel);

// d_x [B, N, D] and the gradients of every layer's parameters, from d_y and what the forward saved. `added`, gradients of
// the same parameters from another use of the layers, are added to them; or it is empty.
template <class T>
void latent_layers_backward(const LatentLayers<T>& call, const T* d_y, const T* saved, T* d_x,
                            const std::vector<LatentLayerParameters<T>>& gradients,
                            const std::vector<LatentLayerParameters<const T>>& added, const Parallel& parallel);

}  // namespace perceiver_fast
