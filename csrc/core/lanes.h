// Rows of queries to tables with one query a vector lane, [channels][lanes], and back.
#pragma once

#include <algorithm>
#include <cstdint>

namespace perceiver_fast {

constexpr int64_t kLineFloats = 16;  // a cache line of every row at a time

// table[c][lane] = factor[lane] * rows[lane][c] for `count` rows, zero in the other lanes.
template <class T>
void rows_to_lanes(const T* rows, int64_t row_stride, int64_t count, int64_t length, int64_t lanes, const T* factor,
                   T* table) {
  for (int64_t c0 = 0; c0 < length; c0 += kLineFloats) {
    const int64_t c1 = std::min(c0 + kLineFloats, length);
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t c = c0; c < c1; ++c)
        table[c * lanes + lane] = lane < count ? factor[lane] * rows[lane * row_stride + c] : T(0);
  }
}

// rows[lane][c] = factor[lane] * table[c][lane] for `count` rows.
template <class T>
void lanes_to_rows(const T* table, int64_t length, int64_t lanes, const T* factor, int64_t count, T* rows,
                   int64_t row_stride) {
  for (int64_t c0 = 0; c0 < length; c0 += kLineFloats) {
    const int64_t c1 = std::min(c0 + kLineFloats, length);
    for (int64_t lane = 0; lane < count; ++lane)
      for (int64_t c = c0; c < c1; ++c) rows[lane * row_stride + c] = factor[lane] * table[c * lanes + lane];
  }
}

}  // namespace perceiver_fast
