// dW = sum_m r_m z_m^T d_out_m: the forward's product of tiles, here summed over tokens. Tokens are split over blocks,
// whose partial sums a second kernel adds in order: without atomics, so that every run gives the same result.
#pragma once

#include "fourier_projection_forward.cuh"

namespace perceiver_fast {

// Into how many parts to split the tokens: about a thousand blocks in all, none below 256 tokens. The same on every
// card, so that results do not depend on it; partial sums take at most about 40 MB (float64: 80).
inline int weight_splits(int64_t tokens, int64_t tiles) {
  const int64_t wanted = blocks_for(1024, tiles), most = blocks_for(tokens, 256);
  return int(wanted < most ? wanted : most);
}

template <class T>
int weight_splits(const FourierTokens<T>& tokens, int columns) {
  return weight_splits(tokens.tokens, blocks_for(tokens.channels, Tile<T>::rows) * blocks_for(columns, kColumns));
}

// partial [splits, C, D]. A thread computes the codes of one and the same band for one token after the other.
template <class T>
__global__ void __launch_bounds__(kThreads, TileShape<T>::blocks)
    fourier_dweight_kernel(FourierTokens<T> tokens, const T* d_out, const T* scale, int columns, int64_t split_tokens,
                           T* partial) {
  using Out = Tile<T>;
  __shared__ Panel<T, Out::rows> code;
  __shared__ Panel<T, kColumns> grad;
  constexpr int step = kThreads / (Out::rows / 2);
  const int v0 = blockIdx.x * Out::rows, n0 = blockIdx.y * kColumns;
  const int64_t first = blockIdx.z * split_tokens, last = min(first + split_tokens, tokens.tokens);
  const int place = threadIdx.x % (Out::rows / 2) * 2, v = v0 + place;
  const bool band = v < 2 * tokens.pairs;
  const int axis = band ? tokens.axis_of(v / 2) : 0;
  const double frequency = band ? tokens.frequencies[v / 2] : 0.0;
  int64_t position = (first + threadIdx.x / (Out::rows / 2)) % tokens.positions;
  Out tile;
  for (int64_t x0 = first; x0 < last; x0 += kDepth) {
    if (x0 > first) __syncthreads();
    const int terms = int(min(last - x0, int64_t(kDepth)));
#pragma unroll 2
    for (int k = threadIdx.x / (Out::rows / 2); k < kDepth; k += step) {
      T one = 0, other = 0;
      const double* coords = tokens.coords + position * tokens.axes;
      if (k < terms && band) sin_cos_pi<T>(coords[axis], frequency, one, other);
      if (k < terms && !band) tokens.encode(v, tokens.features_of(x0 + k), coords, one, other);
      const T r = scale && k < terms ? scale[x0 + k] : T(1);
      code.at[k][place] = r * one;
      code.at[k][place + 1] = r * other;
      for (position += step; position >= tokens.positions;) position -= tokens.positions;
    }
    load_panel(grad, n0, columns, terms, [&](int k) { return d_out + (x0 + k) * columns; });
    __syncthreads();
    tile.add(code, grad, panel_depth(0, terms));
  }
  T* to = partial + int64_t(blockIdx.z) * tokens.channels * columns;
#pragma unroll
  for (int i = 0; i < Out::thread_rows; ++i) {
    const int row = v0 + Out::row(i);
    if (row >= tokens.channels) continue;
    T* channel = to + int64_t(tokens.channel(row)) * columns;
#pragma unroll
    for (int j = 0; j < Out::thread_columns; j += 4) {
      const int n = n0 + Out::column(j);
      Four<T> value;
#pragma unroll
      for (int c = 0; c < 4; ++c) value.at[c] = tile.sum[i][j + c];
      store_four(channel + n, value, columns - n, columns % 4 == 0);
    }
  }
}

// to[i] = sum_s parts[s][i], in order and in double.
template <class From, class To>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const From* parts, int64_t count, int64_t size, To* to) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  double sum = 0;
  for (int64_t s = 0; s < count; ++s) sum += parts[s * size + i];
  to[i] = To(sum);
}

// Fills dweight [C, D]; partial holds weight_splits(..) times as much, and is not needed for one split.
template <class T, class Launch>
void fourier_projection_dweight(const Launch& launch, const FourierTokens<T>& tokens, const T* d_out, const T* scale,
                                int columns, T* partial, T* dweight) {
  const int splits = weight_splits(tokens, columns);
  const int64_t size = int64_t(tokens.channels) * columns;
  launch(fourier_dweight_kernel<T>,
         dim3(blocks_for(tokens.channels, Tile<T>::rows), blocks_for(columns, kColumns), splits), tokens, d_out, scale,
         columns, blocks_for(tokens.tokens, splits), splits > 1 ? partial : dweight);
  if (splits > 1)
    launch(add_parts_kernel<T, T>, dim3(blocks_for(size, kThreads)), static_cast<const T*>(partial), int64_t(splits),
           size, dweight);
}

}  // namespace perceiver_fast
