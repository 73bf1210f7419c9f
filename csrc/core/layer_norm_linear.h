// LayerNorm of rows and the product that follows it, for few rows, on the CPU and free of torch. See
// perceiver_fast/ops/layer_norm_linear.py for the maths. All arrays are dense. T is float or double.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace perceiver_fast {

template <class T>
struct LayerNormLinear {
  int64_t rows, channels, out_channels;
  double eps;              // more than 0
  const T* x;              // [rows, channels]
  const T *gain, *shift;   // [channels]
  const T* weight;         // [out_channels, channels]
};

// out [rows, out_channels].
template <class T>
void layer_norm_linear_forward(const LayerNormLinear<T>& call, T* out, const Parallel& parallel);

// d_x may be null.
template <class T>
void layer_norm_linear_backward(const LayerNormLinear<T>& call, const T* d_out, T* d_x, T* d_gain, T* d_shift,
                                T* d_weight, const Parallel& parallel);

}  // namespace perceiver_fast
