// How rows of a matrix are shared out to threads, and sums over them made the same whatever the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "aligned.h"
#include "dtypes.h"
#include "parallel.h"

namespace perceiver_fast {

constexpr int64_t kGrain = 16384;   // elements of a share of the work: less is done before another thread has woken
constexpr int64_t kSumRows = 32;    // terms of the longest chain of a sum over rows
constexpr int64_t kMostParts = 256;

// body(begin, end) for ranges of rows of `columns` elements.
template <class Body>
void for_rows(int64_t rows, int64_t columns, const Parallel& parallel, Body body) {
  const int64_t shares = std::max<int64_t>(1, std::min(rows, rows * columns / kGrain));
  parallel.run(shares, [&](int64_t begin, int64_t end) { body(rows * begin / shares, rows * end / shares); });
}

// Sums over rows of `count` terms each; block(begin, end, sums) adds those of some rows, kSumRows at most, to sums.
// Rows are of `columns` elements.
//
// They fall into parts by their number and length alone, a part into blocks. Sums of blocks meet in their part's, and
// those of parts in pairs, always in the same order: no chain is long, and no bit depends on threads.
template <class T, class Block>
Aligned<T> sum_rows(int64_t rows, int64_t columns, int64_t count, const Parallel& parallel, Block block) {
  const int64_t blocks = (rows + kSumRows - 1) / kSumRows;
  const int64_t parts = std::max<int64_t>(1, std::min({blocks, rows * columns / kGrain, kMostParts}));
  Aligned<T> totals(parts * count);
  parallel.run(parts, [&](int64_t first, int64_t last) {
    const Aligned<T> scratch(count);
    for (int64_t part = first; part < last; ++part) {
      T* total = totals.get() + part * count;
      std::fill_n(total, count, T(0));
      const int64_t begin = blocks * part / parts, end = blocks * (part + 1) / parts;
      for (int64_t b = begin; b < end; ++b) {
        T* sums = b == begin ? total : scratch.get();
        if (b > begin) std::fill_n(sums, count, T(0));
        block(b * kSumRows, std::min(rows, (b + 1) * kSumRows), sums);
        for (int64_t i = 0; b > begin && i < count; ++i) total[i] += sums[i];
      }
    }
  });
  // Neighbours meet in the place of the left one.
  for_rows(count, parts, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t step = 1; step < parts; step *= 2)
      for (int64_t part = 0; part + step < parts; part += 2 * step) {
        T* left = totals.get() + part * count;
        const T* right = left + step * count;
        for (int64_t i = begin; i < end; ++i) left[i] += right[i];
      }
  });
  return totals;
}

// A sum in the dtype of its gradient; to bfloat16 it is rounded as elsewhere, to nearest and ties to even.
inline void store_sum(double sum, double* to) { *to = sum; }
inline void store_sum(float sum, float* to) { *to = sum; }
inline void store_sum(float sum, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  bits = sum != sum ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  to->bits = uint16_t(bits >> 16);
}

}  // namespace perceiver_fast
