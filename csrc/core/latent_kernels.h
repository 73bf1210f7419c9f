// What latents in vector lanes are computed with: see latent_columns.h. T is float or double.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "kernel_tables.h"

namespace perceiver_fast {

// Kernels on matrices with one latent a vector lane, [channels, columns]: `columns` is a multiple of any vector's lanes.
// Arrays named `sums` are added to.
template <class T>
struct LatentKernels {
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
  // x += bias.
  void (*add_bias)(int64_t channels, int64_t columns, const T* bias, T* x);
  // x += branch + bias, or x += (branch + bias) noise.
  void (*join)(int64_t channels, int64_t columns, const T* branch, const T* bias, const T* noise, T* x);
  // to = x noise.
  void (*multiply)(int64_t channels, int64_t columns, const T* x, const T* noise, T* to);
  // Softmax of `scale` times logits [tokens, columns] over the tokens, in place. Unless `most` is null, most [columns] are
  // the logits that are largest when scaled, and sum [columns] the sums of exponentials of scaled logits less theirs.
  void (*softmax)(int64_t tokens, int64_t columns, T* logits, double scale, T* most, T* sum);
  // to = weights times `factor`, those that dropout drops zero; hashes are of the columns and of the tokens.
  void (*drop)(int64_t tokens, int64_t columns, const T* weights, const typename HashLane<T>::type* column_hashes,
               const uint32_t* token_hashes, uint32_t threshold, T factor, T* to);
  // d_weights become the gradient of the logits. d_lse [columns] is that of the log-sum-exp of scaled logits, or null.
  void (*softmax_backward)(int64_t tokens, int64_t columns, const T* weights, T* d_weights, double scale,
                           const T* d_lse);
  // Values and gates [F, columns] += their bias, u = geglu of them.
  void (*geglu)(int64_t features, int64_t columns, const T* value_bias, const T* gate_bias, T* values, T* gates, T* u);
  void (*geglu_backward)(int64_t features, int64_t columns, const T* d_u, const T* values, const T* gates, T* u,
                         T* d_values, T* d_gates);
  // Sums over the columns.
  void (*row_sums)(int64_t rows, int64_t columns, const T* x, T* sums);
};

PF_KERNEL_TABLES(LatentKernels, latent)

}  // namespace perceiver_fast
