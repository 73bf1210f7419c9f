// A tile of a matrix product in registers, computed from panels in shared memory. Every kernel of the projection fills
// panels in its own way and multiplies them here. Plain multiply-adds in T (no TF32): float32 has all its digits.
#pragma once

#include <cstdint>

namespace perceiver_fast {

constexpr int kThreads = 128;  // of every block
constexpr int kColumns = 64;   // of a tile
constexpr int kDepth = 32;     // of the panels: terms of the product between two barriers
constexpr int kPad = 4;        // keeps vector loads aligned and makes the transposed stores below free of conflicts

// Rows of a tile, how much of it a thread owns, and how many blocks a multiprocessor should hold, which limits a thread
// to 128 registers for float32 and 168 for float64.
template <class T>
struct TileShape;
template <>
struct TileShape<float> {
  static constexpr int rows = 128, thread_rows = 8, thread_columns = 8, blocks = 4;
};
template <>
struct TileShape<double> {
  static constexpr int rows = 64, thread_rows = 8, thread_columns = 4, blocks = 3;
};

// Four neighbours, read and written as one vector.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

template <class T, int kWidth>
struct alignas(4 * sizeof(T)) Panel {
  T at[kDepth][kWidth + kPad];
};

template <class T>
struct Tile {
  using Shape = TileShape<T>;
  static constexpr int rows = Shape::rows, thread_rows = Shape::thread_rows, thread_columns = Shape::thread_columns;
  static constexpr int threads_across = kColumns / thread_columns;
  static_assert(threads_across * (rows / thread_rows) == kThreads, "a thread for every part of the tile");

  T sum[thread_rows][thread_columns] = {};

  // A thread owns groups of four rows and of four columns, spread over the tile so that a warp reads neighbours.
  static __device__ int row(int i) {
    return i / 4 * (rows / (thread_rows / 4)) + threadIdx.x / threads_across * 4 + i % 4;
  }
  static __device__ int column(int j) {
    return j / 4 * (kColumns / (thread_columns / 4)) + threadIdx.x % threads_across * 4 + j % 4;
  }

  // sum[i][j] += sum_k left[k][row i] right[k][column j] for the first `depth` k.
  __device__ void add(const Panel<T, rows>& left, const Panel<T, kColumns>& right, int depth) {
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      Four<T> l[thread_rows / 4], r[thread_columns / 4];
#pragma unroll
      for (int i = 0; i < thread_rows / 4; ++i) l[i] = *reinterpret_cast<const Four<T>*>(&left.at[k][row(4 * i)]);
#pragma unroll
      for (int j = 0; j < thread_columns / 4; ++j)
        r[j] = *reinterpret_cast<const Four<T>*>(&right.at[k][column(4 * j)]);
#pragma unroll
      for (int i = 0; i < thread_rows; ++i)
#pragma unroll
        for (int j = 0; j < thread_columns; ++j) sum[i][j] += l[i / 4].at[i % 4] * r[j / 4].at[j % 4];
    }
  }
};

// Terms k0.. of a panel, rounded up to whole steps of the unrolled product; the loaders write zeros beyond `terms`.
inline __device__ int panel_depth(int k0, int terms) { return min(kDepth, (terms - k0 + 3) / 4 * 4); }

// to[k][j] = row(k)[n0 + j], zero outside `depth` rows and `columns` columns. Warps read along the rows.
template <class T, class Row>
__device__ void load_panel(Panel<T, kColumns>& to, int n0, int columns, int depth, const Row& row) {
  constexpr int step = kThreads / kColumns;
  const int j = threadIdx.x % kColumns;
#pragma unroll 8
  for (int k = threadIdx.x / kColumns; k < kDepth; k += step) {
    const T* from = k < depth && n0 + j < columns ? row(k) : nullptr;
    to.at[k][j] = from ? from[n0 + j] : T(0);
  }
}

// to[k][j] = row(j)[k0 + k], zero outside `terms` and where row(j) is null. A warp reads eight terms (a sector of
// float32) of four rows, and so stores to 32 different banks.
template <class T, int kWidth, class Row>
__device__ void load_transposed(Panel<T, kWidth>& to, int k0, int terms, const Row& row) {
  const int lane = threadIdx.x % 32, k = lane % 8;
#pragma unroll 2
  for (int j = threadIdx.x / 32 * 4 + lane / 8; j < kWidth; j += kThreads / 8) {
    const T* from = row(j);
#pragma unroll
    for (int i = k; i < kDepth; i += 8) to.at[i][j] = from && k0 + i < terms ? from[k0 + i] : T(0);
  }
}

// Writes up to four neighbours of a row: one vector where the row is aligned, else those before `count`.
template <class T>
__device__ void store_four(T* to, const Four<T>& value, int count, bool aligned) {
  if (aligned && count >= 4) {
    *reinterpret_cast<Four<T>*>(to) = value;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < count) to[j] = value.at[j];
  }
}

}  // namespace perceiver_fast
