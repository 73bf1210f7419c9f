// Gradients of features and positions. With e_c = sum_x d_out_x W_cx, dr = sum_c z_c e_c and g = dr r^3 / C:
//
//   dz_c = r e_c - g (z_c - mu)
//   dp_a = r E_a - g (mu S_a + p_a - mu)
//   E_a = e_p + sum_k pi f (e_sin cos - e_cos sin),   S_a = sum_k pi f (sin - cos)
//
// dp_a is that short because the products sin cos of z itself cancel. So one sweep over the channels is enough: dr and
// mu are known at its end, and only E_a and S_a are stored until then.
#pragma once

#include "fourier_projection_dweight.cuh"

namespace perceiver_fast {

// Where the values of one token are.
template <class T>
struct TokenRows {
  const T* features;
  const double* position;
  T* dfeat;           // [F]: holds e_f until the end
  double* dposition;  // [A]: holds E_a until the end
  double* spread;     // [A]: S_a; null without LayerNorm
};

// The sums of one token, which one thread adds to channel by channel, in the order of FourierTokens.
template <class T>
struct TokenSums {
  TokenRows<T> at;
  double dr = 0, sum = 0, along = 0, apart = 0;
  int axis = 0;

  __device__ void end_axis() {
    constexpr double pi = 3.141592653589793;
    at.dposition[axis] = pi * along;
    if (at.spread) at.spread[axis] = pi * apart;
    along = apart = 0;
  }

  // Places v0 .. v0 + 63, whose e stand in products[place][token]. Sums over these are in T, sums over
  // all places in double.
  template <int kWidth>
  __device__ void add(const FourierTokens<T>& tokens, int v0, const T (&products)[kColumns][kWidth], int token) {
    T tile_dr = 0, tile_sum = 0, tile_along = 0, tile_apart = 0;
    const int last = min(kColumns, tokens.channels - v0), bands = min(last, 2 * tokens.pairs - v0);
    int j = 0;
    for (; j < bands; j += 2) {
      const int pair = (v0 + j) / 2, a = tokens.axis_of(pair);
      if (a != axis) {
        along += tile_along, apart += tile_apart;
        tile_along = tile_apart = 0;
        end_axis();
        axis = a;
      }
      const double frequency = tokens.frequencies[pair];
      T sine, cosine;
      sin_cos_pi<T>(at.position[a], frequency, sine, cosine);
      const T e_sine = products[j][token], e_cosine = products[j + 1][token];
      tile_dr += sine * e_sine + cosine * e_cosine;
      tile_sum += sine + cosine;
      tile_along += T(frequency) * (e_sine * cosine - e_cosine * sine);
      tile_apart += T(frequency) * (sine - cosine);
    }
    along += tile_along, apart += tile_apart;
    if (bands > 0 && v0 + bands == 2 * tokens.pairs) end_axis();
    for (; j < last; ++j) {
      const int s = v0 + j - 2 * tokens.pairs;
      const T value = tokens.single(s, at.features, at.position), e = products[j][token];
      tile_dr += value * e;
      tile_sum += value;
      if (s < tokens.features) {
        at.dfeat[s] = e;
      } else {
        const int a = s - tokens.features;
        at.dposition[a] = tokens.bands ? at.dposition[a] + e : double(e);
      }
    }
    dr += tile_dr, sum += tile_sum;
  }

  __device__ void finish(const FourierTokens<T>& tokens, const T* scale) const {
    const double r = scale ? double(*scale) : 1.0, mean = sum / tokens.channels;
    const double g = scale ? dr * r * r * r / tokens.channels : 0.0;
    for (int f = 0; f < tokens.features; ++f) at.dfeat[f] = T(r * at.dfeat[f] - g * (at.features[f] - mean));
    for (int a = 0; a < tokens.axes; ++a) {
      const double waves = scale && tokens.bands ? mean * at.spread[a] : 0.0;
      at.dposition[a] = r * at.dposition[a] - g * (waves + at.position[a] - mean);
    }
  }
};

constexpr int kTokenBlocks = 3;  // an SM: with a fourth, a token's sums spill from the registers beside the tile

// dposition and spread [B M, A], dfeat [B M, F]. A block owns a tile of tokens and takes 64 channels at a time: all
// threads compute the tile of e = d_out W^T, then one thread for every token adds it to the token's sums.
template <class T>
__global__ void __launch_bounds__(kThreads, kTokenBlocks)
    fourier_dtokens_kernel(FourierTokens<T> tokens, const T* d_out, const T* weight, const T* scale, int columns,
                           T* dfeat, double* dposition, double* spread) {
  using Out = Tile<T>;
  struct Panels {
    Panel<T, Out::rows> grad;
    Panel<T, kColumns> rows;
  };
  union Memory {
    Panels panels;
    T products[kColumns][Out::rows + kPad];
  };
  __shared__ Memory memory;
  const int64_t x0 = int64_t(blockIdx.x) * Out::rows, x = x0 + threadIdx.x;
  const bool owner = threadIdx.x < Out::rows && x < tokens.tokens;
  TokenSums<T> token;
  if (owner)
    token.at = {tokens.features_of(x), tokens.position(x), dfeat + x * tokens.features, dposition + x * tokens.axes,
                spread ? spread + x * tokens.axes : nullptr};
  for (int v0 = 0; v0 < tokens.channels; v0 += kColumns) {
    Out tile;
    for (int n0 = 0; n0 < columns; n0 += kDepth) {
      __syncthreads();
      load_transposed(memory.panels.grad, n0, columns,
                      [&](int i) { return x0 + i < tokens.tokens ? d_out + (x0 + i) * columns : nullptr; });
      load_transposed(memory.panels.rows, n0, columns, [&](int j) {
        return v0 + j < tokens.channels ? weight + int64_t(tokens.channel(v0 + j)) * columns : nullptr;
      });
      __syncthreads();
      tile.add(memory.panels.grad, memory.panels.rows, panel_depth(n0, columns));
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < Out::thread_columns; ++j)
#pragma unroll
      for (int i = 0; i < Out::thread_rows; i += 4) {
        Four<T> value;
#pragma unroll
        for (int c = 0; c < 4; ++c) value.at[c] = tile.sum[i + c][j];
        *reinterpret_cast<Four<T>*>(&memory.products[Out::column(j)][Out::row(i)]) = value;
      }
    __syncthreads();
    if (owner) token.add(tokens, v0, memory.products, threadIdx.x);
  }
  if (owner) token.finish(tokens, scale ? scale + x : nullptr);
}

// Fills dfeat [B, M, F] and dcoords [Bc, M, A]. Workspaces of B M A doubles: spread with a scale, rows when the batch
// shares its positions.
template <class T, class Launch>
void fourier_projection_dtokens(const Launch& launch, const FourierTokens<T>& tokens, const T* d_out, const T* weight,
                                const T* scale, int columns, double* spread, double* rows, T* dfeat, double* dcoords) {
  const bool shared = tokens.positions != tokens.tokens;
  launch(fourier_dtokens_kernel<T>, dim3(blocks_for(tokens.tokens, Tile<T>::rows)), tokens, d_out, weight, scale,
         columns, dfeat, shared ? rows : dcoords, spread);
  const int64_t size = tokens.positions * tokens.axes;
  if (shared)
    launch(add_parts_kernel<double, double>, dim3(blocks_for(size, kThreads)), static_cast<const double*>(rows),
           tokens.tokens / tokens.positions, size, dcoords);
}

}  // namespace perceiver_fast
