// out_m = r_m (z_m W) + bias, the scale r_m of LayerNorm included; see perceiver_fast/ops/fourier_projection.py.
#pragma once

#include "fourier_tokens.cuh"
#include "tile.cuh"

namespace perceiver_fast {

constexpr int kStatisticTokens = 32, kStatisticSlices = kThreads / kStatisticTokens;

// The slices' values of every token, added in order. Every thread of the block takes part.
inline __device__ double add_slices(double (&slices)[kStatisticSlices][kStatisticTokens], double value) {
  const int token = threadIdx.x % kStatisticTokens;
  __syncthreads();
  slices[threadIdx.x / kStatisticTokens][token] = value;
  __syncthreads();
  double total = 0;
#pragma unroll
  for (int i = 0; i < kStatisticSlices; ++i) total += slices[i][token];
  return total;
}

// scale[x] = 1 / sqrt(var(z_x) + eps). A warp holds one slice of the channels of 32 tokens. The bands' sum of squares
// needs no second look, since sin^2 + cos^2 = 1; features and positions are centred before they are squared.
template <class T>
__global__ void __launch_bounds__(kThreads) fourier_scale_kernel(FourierTokens<T> tokens, double eps, T* scale) {
  __shared__ double slices[kStatisticSlices][kStatisticTokens];
  const int slice = threadIdx.x / kStatisticTokens;
  const int64_t x = int64_t(blockIdx.x) * kStatisticTokens + threadIdx.x % kStatisticTokens;
  const int64_t inside = min(x, tokens.tokens - 1);
  const double* position = tokens.position(inside);
  const T* features = tokens.features_of(inside);
  double waves = 0, singles = 0, squares = 0;
  for (int pair = slice; pair < tokens.pairs; pair += kStatisticSlices) {
    T sine, cosine;
    sin_cos_pi<T>(position[tokens.axis_of(pair)], tokens.frequencies[pair], sine, cosine);
    waves += sine + cosine;
  }
  const int count = tokens.features + tokens.axes;
  for (int s = slice; s < count; s += kStatisticSlices) singles += tokens.single(s, features, position);
  waves = add_slices(slices, waves);
  const double mean = (waves + add_slices(slices, singles)) / tokens.channels;
  for (int s = slice; s < count; s += kStatisticSlices) {
    const double centred = tokens.single(s, features, position) - mean;
    squares += centred * centred;
  }
  squares = add_slices(slices, squares) + tokens.pairs * (1 + 2 * mean * mean) - 2 * mean * waves;
  const double variance = max(squares / tokens.channels, 0.0);  // bands alone may cancel to just below zero
  if (slice == 0 && x < tokens.tokens) scale[x] = T(1 / sqrt(variance + eps));
}

// A block owns a tile of tokens and 64 columns of the output. It makes 32 channels of its tokens in shared memory,
// reads the 32 rows of the weight, multiplies, and so on. Every 64 columns make the encoding anew: about 25
// instructions for a sine and a cosine, against 128 multiply-adds.
template <class T>
__global__ void __launch_bounds__(kThreads, TileShape<T>::blocks)
    fourier_projection_kernel(FourierTokens<T> tokens, const T* weight, const T* bias, const T* scale, int columns,
                              T* out) {
  using Out = Tile<T>;
  __shared__ Panel<T, Out::rows> code;
  __shared__ Panel<T, kColumns> rows;
  const int64_t x0 = int64_t(blockIdx.x) * Out::rows;
  const int n0 = blockIdx.y * kColumns;
  const int token = threadIdx.x % Out::rows;
  const int64_t inside = min(x0 + token, tokens.tokens - 1);  // rows beyond the last repeat it and are not stored
  const double* position = tokens.position(inside);
  const T* features = tokens.features_of(inside);
  Out tile;
  for (int v0 = 0; v0 < tokens.channels; v0 += kDepth) {
    if (v0 > 0) __syncthreads();
    const int depth = panel_depth(v0, tokens.channels);
#pragma unroll 2
    for (int k = threadIdx.x / Out::rows * 2; k < depth; k += kThreads / Out::rows * 2)
      tokens.encode(v0 + k, features, position, code.at[k][token], code.at[k + 1][token]);
    load_panel(rows, n0, columns, tokens.channels - v0,
               [&](int k) { return weight + int64_t(tokens.channel(v0 + k)) * columns; });
    __syncthreads();
    tile.add(code, rows, depth);
  }
#pragma unroll
  for (int i = 0; i < Out::thread_rows; ++i) {
    const int64_t x = x0 + Out::row(i);
    if (x >= tokens.tokens) continue;
    const T r = scale ? scale[x] : T(1);
#pragma unroll
    for (int j = 0; j < Out::thread_columns; j += 4) {
      const int n = n0 + Out::column(j);
      Four<T> value;
#pragma unroll
      for (int c = 0; c < 4; ++c) value.at[c] = tile.sum[i][j + c] * r + (bias && n + c < columns ? bias[n + c] : T(0));
      store_four(out + x * columns + n, value, columns - n, columns % 4 == 0);
    }
  }
}

inline int64_t blocks_for(int64_t items, int64_t size) { return (items + size - 1) / size; }

// Fills out [B M, D] and, with a scale to fill, scale [B M]. launch(kernel, grid, arguments..) starts a kernel.
template <class T, class Launch>
void fourier_projection_forward(const Launch& launch, const FourierTokens<T>& tokens, const T* weight, const T* bias,
                                int columns, double eps, T* scale, T* out) {
  if (scale)
    launch(fourier_scale_kernel<T>, dim3(blocks_for(tokens.tokens, kStatisticTokens)), tokens, eps, scale);
  if (columns == 0) return;
  launch(fourier_projection_kernel<T>, dim3(blocks_for(tokens.tokens, Tile<T>::rows), blocks_for(columns, kColumns)),
         tokens, weight, bias, static_cast<const T*>(scale), columns, out);
}

}  // namespace perceiver_fast
