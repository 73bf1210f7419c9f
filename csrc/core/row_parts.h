// How rows of a matrix are shared out to threads, and sums over them made the same whatever the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "aligned.h"
#include "dtypes.h"
#include "parallel.h"

namespace perceiver_fast {

constexpr int64_t kGrain = 16384;    // elements of a thread's share at least: less is done before a thread has woken up
constexpr int64_t kSumRows = 32;     // rows that are added one after the other, the longest such sum
constexpr int64_t kMostParts = 256;  // of a sum over rows, each with memory of its own

// body(begin, end) for ranges of rows of `columns` elements.
template <class Body>
void for_rows(int64_t rows, int64_t columns, const Parallel& parallel, Body body) {
  const int64_t shares = std::max<int64_t>(1, std::min(rows, rows * columns / kGrain));
  parallel.run(shares, [&](int64_t begin, int64_t end) { body(rows * begin / shares, rows * end / shares); });
}

// Sums over rows of `count` terms each; block(begin, end, sums) adds those of some rows, kSumRows at most, to sums.
// Rows are of `columns` elements.
//
// The rows are cut into parts, and these into blocks, depending on the number and the length of the rows alone. Sums of
// blocks are added to their part's, and sums of parts are added in pairs, always in the same order: so roundings do not
// pile up, and no bit depends on the number of threads.
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
  // The sum of two neighbours takes the place of the left one.
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
