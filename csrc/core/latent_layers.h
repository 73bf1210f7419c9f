// A few latents through pre-normalised layers, self-attention and feed-forward, on the CPU and free of torch. See
// perceiver_fast/ops/latent_layers.py for the maths.
//
// B batch elements of N latents of D channels, dense [B, N, D]. T is float or double.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_tables.h"
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

// d_x [B, N, D] and the gradients of every layer's parameters, from d_y and what the forward saved.
template <class T>
void latent_layers_backward(const LatentLayers<T>& call, const T* d_y, const T* saved, T* d_x,
                            const std::vector<LatentLayerParameters<T>>& gradients, const Parallel& parallel);

// Kernels on matrices with one latent a vector lane, [channels, columns]: `columns` is a multiple of any vector's lanes.
// Arrays named `sums` are added to.
template <class T>
struct LatentLayersKernels {
  // c = w b, or c += w b: see tile_gemm.h.
  void (*product)(int64_t rows, int64_t columns, int64_t depth, const T* w, int64_t w_row, int64_t w_step, const T* b,
                  int64_t b_row, T* c, int64_t c_row, bool accumulate);
  void (*transpose)(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row);
  // xhat = (x - mean(x)) rstd, over the channels.
  void (*normalize)(int64_t channels, int64_t columns, const T* x, double eps, T* xhat, T* rstd);
  // d_x += the gradient of x. `weight_sums` and `bias_sums` are [channels].
  void (*normalize_backward)(int64_t channels, int64_t columns, const T* d_z, const T* xhat, const T* rstd,
                             const T* weight, T* d_x, T* weight_sums, T* bias_sums);
  // z = xhat weight + bias.
  void (*affine)(int64_t channels, int64_t columns, const T* xhat, const T* weight, const T* bias, T* z);
  // x += branch + bias.
  void (*join)(int64_t channels, int64_t columns, const T* branch, const T* bias, T* x);
  // Softmax of `scale` times logits [tokens, columns] over the tokens, in place.
  void (*softmax)(int64_t tokens, int64_t columns, T* logits, double scale);
  // d_weights become the gradient of the logits.
  void (*softmax_backward)(int64_t tokens, int64_t columns, const T* weights, T* d_weights, double scale);
  // h [2 F, columns] += bias, u = geglu(h).
  void (*geglu)(int64_t features, int64_t columns, const T* bias, T* h, T* u);
  void (*geglu_backward)(int64_t features, int64_t columns, const T* d_u, const T* h, T* u, T* d_h);
  // Sums over the columns.
  void (*row_sums)(int64_t rows, int64_t columns, const T* x, T* sums);
};

PF_KERNEL_TABLES(LatentLayersKernels, latent_layers)

}  // namespace perceiver_fast
