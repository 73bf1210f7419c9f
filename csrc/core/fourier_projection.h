// Fourier position encoding fused with the input projection, on the CPU and free of torch. See
// perceiver_fast/ops/fourier_projection.py for the maths.
//
// B batch, M tokens, F raw channels, A axes, K frequencies an axis, C = F + A (2 K + 1) channels of a token, D outputs.
// Bc is B, or 1 when the whole batch shares its positions. T is float or double. All arrays are dense and row-major.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace perceiver_fast {

template <class T>
struct FourierProjectionInput {
  int64_t batch, position_batch, tokens, features, axes, bands, outputs;
  const T* feat;              // [B, M, F], null when F is 0
  const double* coords;       // [Bc, M, A]
  const double* frequencies;  // [A, K], in half periods a unit of position
  const T* weight;            // [C, D]: rows of feat, then of every axis sin_1 .. sin_K, cos_1 .. cos_K, position
};

// out [B, M, D] = scale (z weight) + bias; bias [D] may be null. scale [B, M] is LayerNorm's 1 / sqrt(var(z) + eps) of
// every token, or null: then it is 1 and eps is not read. With a scale the weight's columns have to sum to zero.
template <class T>
void fourier_projection_forward(const FourierProjectionInput<T>& in, const T* bias, double eps, T* out, T* scale,
                                const Parallel& parallel);

// dweight [C, D], with a scale up to a row that is the same for every channel, as centring the weight takes that away;
// dfeat [B, M, F] (null when F is 0) and dcoords [Bc, M, A] are computed unless dcoords is null. scale
// is the forward's, or null.
template <class T>
void fourier_projection_backward(const FourierProjectionInput<T>& in, const T* scale, const T* d_out, T* dweight,
                                 T* dfeat, double* dcoords, const Parallel& parallel);

}  // namespace perceiver_fast
