// LayerNorm of a residual stream with the branch that joins it, on the CPU and free of torch. See
// perceiver_fast/ops/layer_norm.py for the maths.
//
// Arrays are dense: [rows, columns], [columns], and [rows] for the statistics. The stream and its parameters are of
// dtype S, what enters and leaves the branch of dtype P.
#pragma once

#include "dtypes.h"
#include "kernel_tables.h"
#include "parallel.h"

namespace perceiver_fast {

template <class D>
struct LayerNormForward {
  using S = typename D::Wide;
  using P = typename D::Narrow;
  using T = typename D::T;
  int64_t rows, columns;
  const S* x;
  const P* branch;       // may be null: then x is y, and y is not written
  const S* branch_bias;  // may be null
  const S *weight, *bias;
  double eps;
  S* y;
  P* z;
  T *mean, *rstd;
};

template <class D>
struct LayerNormBackward {
  using S = typename D::Wide;
  using P = typename D::Narrow;
  using T = typename D::T;
  int64_t rows, columns;
  const S* d_y;  // may be null
  const P* d_z;
  const S* y;
  const T *mean, *rstd;
  const S* weight;
  S* d_x;
  P* d_branch;  // may be null
  S *d_weight, *d_bias;
  S* d_branch_bias;  // may be null
};

template <class D>
void layer_norm_forward(const LayerNormForward<D>& call, const Parallel& parallel);

template <class D>
void layer_norm_backward(const LayerNormBackward<D>& call, const Parallel& parallel);

// Kernels for rows [begin, end). The backward adds to sums, which are [3, columns]: of weight, bias, and branch_bias.
template <class D>
struct LayerNormKernels {
  void (*forward)(const LayerNormForward<D>& call, int64_t begin, int64_t end);
  void (*backward)(const LayerNormBackward<D>& call, int64_t begin, int64_t end, typename D::T* sums);
};

PF_KERNEL_TABLES(LayerNormKernels, layer_norm)

}  // namespace perceiver_fast
