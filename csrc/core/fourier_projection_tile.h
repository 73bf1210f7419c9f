// What the per-ISA kernels of the Fourier projection work on, and the table they are reached through.
//
// A kernel runs tile by tile: kFourierTile consecutive tokens of one set of positions, for every batch element that
// shares them. The encoding of a tile is stored channel by channel, [C][kFourierTile], one token a vector lane: sines
// need no padding for any number of frequencies, statistics and gradients of positions never sum across lanes, and
// tile_gemm reads it as it lies, as rows or as columns.
#pragma once

#include <cstdint>

#include "fourier_projection.h"
#include "kernel_tables.h"

namespace perceiver_fast {

constexpr int64_t kFourierTile = 64;

template <class T>
struct FourierForward {
  const FourierProjectionInput<T>& in;
  const T* panels;  // the weight in panels of `panel` outputs, [D padded / panel][C][panel]
  const T* bias;    // [D padded], zeros where there is none
  int64_t row;      // D padded to whole vectors
  double eps;
  T* out;
  T* scale;  // or null

  // Scratch of one thread, aligned to vectors.
  T* codes;  // [C][kFourierTile]
  T* sums;   // [kFourierTile][row]
  T* base;   // [kFourierTile][row], the positions' part of sums; used when batch elements share positions
};

template <class T>
struct FourierBackward {
  const FourierProjectionInput<T>& in;
  int64_t row;  // D padded to whole vectors
  const T* scale;
  const T* d_out;
  T* dfeat;
  double* dcoords;  // null: gradients of the weight alone

  // Of one thread, aligned to vectors.
  double* dweight;   // [C][row], added to
  T* dweight_short;  // [C][row], sums of a few tiles
  T* codes;          // [C][kFourierTile]
  T* grad;           // [kFourierTile][row], the output's gradient times the scale
  T* grad_sum;       // [kFourierTile][row], over batch elements that share positions
  // Only with dcoords:
  T* d_codes;        // [C][kFourierTile]
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
