// What the per-ISA kernels of the Fourier projection work on, and the table they are reached through.
//
// A kernel runs tile by tile: kFourierTile consecutive tokens of one set of positions, for every batch element that
// shares them. The encoding of a tile is stored channel by channel, [R][kFourierTile], one token a vector lane: sines
// need no padding for any number of frequencies, statistics and gradients of positions never sum across lanes, and
// tile_gemm reads it as it lies, as rows or as columns.
//
// With LayerNorm a token's features are stored less their mean s, its shift: far from zero, products of the features
// themselves would lose the digits that LayerNorm is there to keep. The weight is centred, so all channels may be
// shifted alike, z W = (z - s) W. The positions' codes are not, as batch elements share them: what they lack is one more
// channel, s itself, with the row - sum(W_positions) = sum(W_features). Channels of a tile are then
//
//   features less s [F] ; s (with LayerNorm, features and positions) ; positions' codes [A (2 K + 1)]
//
// R of them; the first F or F + 1, a batch element's own, are called its elements.
#pragma once

#include <cstdint>

#include "fourier_projection.h"
#include "kernel_tables.h"

namespace perceiver_fast {

constexpr int64_t kFourierTile = 64;

// Channels of a token, and of a tile as it is stored.
struct FourierChannels {
  int64_t features, axis_channels;  // F, A (2 K + 1)
  bool has_shift;                   // whether the shift is a channel

  template <class T>
  FourierChannels(const FourierProjectionInput<T>& in, bool normed)
      : features(in.features), axis_channels(in.axes * (2 * in.bands + 1)),
        has_shift(normed && features > 0 && axis_channels > 0) {}
  int64_t token() const { return features + axis_channels; }
  int64_t elements() const { return features + has_shift; }
  int64_t stored() const { return elements() + axis_channels; }
};

template <class T>
struct FourierForward {
  const FourierProjectionInput<T>& in;
  const T* panels;  // the weight in panels of `panel` outputs, [D padded / panel][R][panel]
  const T* bias;    // [D padded], zeros where there is none
  int64_t row;      // D padded to whole vectors
  double eps;
  T* out;
  T* scale;  // or null

  // Scratch of one thread, aligned to vectors.
  T* codes;  // [R][kFourierTile]
  T* sums;   // [kFourierTile][row]
  T* base;   // [kFourierTile][row], the positions' part of sums; used when batch elements share positions
};

template <class T>
struct FourierBackward {
  const FourierProjectionInput<T>& in;
  const T* weight;  // [R][D]
  int64_t row;      // D padded to whole vectors
  const T* scale;
  const T* d_out;
  T* dfeat;
  double* dcoords;  // null: gradients of the weight alone

  // Of one thread, aligned to vectors.
  double* dweight;   // [R][row], added to
  T* dweight_short;  // [R][row], sums of a few tiles
  T* codes;          // [R][kFourierTile]
  T* grad;           // [kFourierTile][row], the output's gradient times the scale
  T* grad_sum;       // [kFourierTile][row], over batch elements that share positions
  // Only with dcoords:
  T* d_codes;        // [R][kFourierTile]
  T* grad_columns;   // [D][kFourierTile]
  T* projected;      // [D][kFourierTile], the positions' part of z weight
};

template <class T>
struct FourierProjectionKernels {
  int lanes, panel;  // elements of a vector, columns of a panel of the packed weight
  // Tiles are counted over all sets of positions: tile i is tile i % n of set i / n, n = ceil(M / kFourierTile).
  void (*forward)(const FourierForward<T>&, int64_t tile_begin, int64_t tile_end);
  void (*backward)(const FourierBackward<T>&, int64_t tile_begin, int64_t tile_end);
};

PF_KERNEL_TABLES(FourierProjectionKernels, fourier_projection)

}  // namespace perceiver_fast
