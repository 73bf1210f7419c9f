// What the drivers of grid_query_attention share: how queries are cut up, and keys as the kernels take them.
#pragma once

#include <algorithm>
#include <vector>

#include "aligned.h"
#include "grid_query_attention.h"
#include "grid_query_attention_block.h"

namespace perceiver_fast {

// The grid as rows and columns, and how many strips are worked on together.
template <class T>
struct QueryBlocking {
  const GridQueryInput<T>& in;
  const GridQueryKernels<T>& kernels;
  int64_t merged = 0;  // trailing axes that are one to the kernels; none for points
  int64_t columns = 1, rows = 1, strips = 1, outer_total = 0, length = 0, group = 1, groups = 0;

  // A strip has `floats` numbers in cache.
  QueryBlocking(const GridQueryInput<T>& input, int64_t floats);

  int64_t outer_axes() const { return int64_t(in.sizes.size()) - merged; }
  QueryRows<T> rows_of(int64_t b, bool blank) const;
  int64_t group_count(int64_t group_index) const { return std::min(group, rows * strips - group_index * group); }
  int64_t padded(int64_t count) const { return (count + kernels.lanes - 1) / kernels.lanes * kernels.lanes; }
  // Digits of a column: the index on each of the merged axes.
  template <class Body>
  void for_merged(Body body) const {  // body(axis, its offset in a table's row, columns an index lasts)
    int64_t lasts = columns, offset = in.features + outer_total;
    for (size_t a = in.sizes.size() - merged; a < in.sizes.size(); ++a) {
      lasts /= in.sizes[a];
      body(in.sizes[a], offset, lasts);
      offset += in.sizes[a];
    }
  }
};

// The keys of all batch elements and heads.
template <class T>
struct PackedKeys {
  std::vector<QueryKeys<T>> heads;            // [B][H]
  std::vector<std::vector<int64_t>> kept;     // [B]: indices of the keys that are not masked
  std::vector<char> uniform;                  // [B]: all keys are masked, and all are kept
  std::vector<std::vector<uint32_t>> hashes;  // [B], of dropout
  std::vector<Aligned<T>> memory;             // [B][H]

  PackedKeys(const QueryBlocking<T>& blocking, bool panels, const Parallel& parallel);
};

// Hashes of dropout of a group's queries, [strips][width].
template <class T>
void hash_queries(const QueryBlocking<T>& blocking, int64_t b, int64_t h, int64_t group,
                  typename HashLane<T>::type* hashes);

}  // namespace perceiver_fast
