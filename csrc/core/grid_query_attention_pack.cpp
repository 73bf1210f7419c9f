// Packing for grid_query_attention: tables and values of the keys that are not masked, as the kernels read them.
//
// Memory: a copy of tables, biases and values; merged axes, at most kMostMerged columns, take their product, not
// their sum.
#include "grid_query_attention_pack.h"

#include <cmath>
#include <numeric>

#include "token_terms.h"

namespace perceiver_fast {

namespace {

constexpr int64_t kFewColumns = 64, kMostMerged = 1024;
constexpr int64_t kCache = 256 << 10, kMostStrips = 8;

// Writes table [strips][count][width] of the columns of one key, the n-th of `count`.
template <class T>
void pack_columns(const QueryBlocking<T>& blocking, const T* row, int64_t n, int64_t count, T* table) {
  const int64_t W = blocking.kernels.width;
  for (int64_t j = 0; j < blocking.strips * W; ++j) table[(j / W * count + n) * W + j % W] = 0;
  blocking.for_merged([&](int64_t size, int64_t offset, int64_t lasts) {
    for (int64_t j = 0; j < blocking.columns; ++j)
      table[(j / W * count + n) * W + j % W] += row[offset + j / lasts % size];
  });
}

template <class T>
T largest(const T* values, int64_t count) {
  T most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, std::abs(values[i]));
  return most;
}

}  // namespace

template <class T>
QueryBlocking<T>::QueryBlocking(const GridQueryInput<T>& input, int64_t floats)
    : in(input), kernels(grid_query_attention_kernels<T>(active_isa())) {
  const std::vector<int64_t>& sizes = in.sizes;
  length = std::accumulate(sizes.begin(), sizes.end(), in.features);
  if (sizes.empty()) {
    columns = in.queries;
  } else {
    do columns *= sizes[sizes.size() - ++merged];
    while (outer_axes() > 0 && columns < kFewColumns && columns * sizes[outer_axes() - 1] <= kMostMerged);
    for (int64_t a = 0; a < outer_axes(); ++a) rows *= sizes[a], outer_total += sizes[a];
  }
  strips = (columns + kernels.width - 1) / kernels.width;
  group = std::max<int64_t>(1, std::min(kMostStrips, kCache / int64_t(sizeof(T)) / floats));
  groups = (rows * strips + group - 1) / group;
}

template <class T>
QueryRows<T> QueryBlocking<T>::rows_of(int64_t b, bool blank) const {
  return {in.features,
          !in.sizes.empty(),
          outer_axes(),
          in.sizes.data(),
          outer_total,
          columns,
          strips,
          in.queries,
          in.feat == nullptr ? nullptr : in.feat + b * in.feat_batch_stride,
          in.scale == nullptr ? nullptr : in.scale + b * in.scale_batch_stride,
          blank};
}

template <class T>
PackedKeys<T>::PackedKeys(const QueryBlocking<T>& blocking, bool panels, const Parallel& parallel)
    : heads(blocking.in.batch * blocking.in.heads),
      kept(blocking.in.batch),
      uniform(blocking.in.batch),
      hashes(blocking.in.batch),
      memory(blocking.in.batch * blocking.in.heads) {
  const GridQueryInput<T>& in = blocking.in;
  const int64_t N = in.keys, F = in.features, C = in.channels, W = blocking.kernels.width, L = blocking.length;
  const int64_t S = blocking.outer_total, panel = blocking.kernels.panel;
  for (int64_t b = 0; b < in.batch; ++b) {
    for (int64_t n = 0; n < N; ++n)
      if (in.mask == nullptr || in.mask[b * N + n]) kept[b].push_back(n);
    uniform[b] = kept[b].empty();
    for (int64_t n = 0; uniform[b] && n < N; ++n) kept[b].push_back(n);
    for (int64_t n : kept[b])
      if (in.dropout) hashes[b].push_back(in.dropout.token_hash(n));
  }
  parallel.run(in.batch * in.heads, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const int64_t b = head / in.heads, count = int64_t(kept[b].size());
      const int64_t columns = in.sizes.empty() ? 0 : blocking.strips * W;
      const int64_t values = panels ? (C + panel - 1) / panel * panel : C;
      memory[head] = Aligned<T>(count * (columns + F + S + 2 + values));
      T *at_columns = memory[head].get(), *feat = at_columns + count * columns, *outer = feat + count * F,
        *bias = outer + count * S, *bias_log2 = bias + count, *v = bias_log2 + count;
      T axes_bound = 0, feat_bound = 0;
      for (int64_t n = 0; n < count; ++n) {
        const int64_t key = head * N + kept[b][n];
        const T* row = in.tables + key * L;
        const T* value = in.v + key * C;
        bias[n] = in.bias == nullptr || uniform[b] ? T(0) : in.bias[key];
        bias_log2[n] = bias[n] * T(kLog2OfE);
        for (int64_t c = 0; c < values; ++c) {
          T& to = panels ? v[(c / panel * count + n) * panel + c % panel] : v[n * C + c];
          to = c < C ? value[c] : T(0);
        }
        if (uniform[b]) continue;
        double square = 0;
        for (int64_t f = 0; f < F; ++f) {
          feat[n * F + f] = row[f];
          square += double(row[f]) * double(row[f]);
        }
        // One that is not a number stays, and bounds nothing.
        if (!(std::sqrt(square) <= double(feat_bound))) feat_bound = T(std::sqrt(square));
        for (int64_t i = 0; i < S; ++i) outer[i * count + n] = row[F + i];
        if (columns > 0) pack_columns(blocking, row, n, count, at_columns);
      }
      if (uniform[b]) std::fill(at_columns, bias, T(0));
      int64_t first = 0;
      for (int64_t a = 0; a < blocking.outer_axes(); first += in.sizes[a++])
        axes_bound += largest(outer + first * count, in.sizes[a] * count);
      axes_bound += largest(at_columns, count * columns);
      heads[head] = {count,
                     feat,
                     outer,
                     at_columns,
                     bias,
                     bias_log2,
                     panels ? nullptr : v,
                     panels ? v : nullptr,
                     hashes[b].data(),
                     axes_bound,
                     largest(bias, count),
                     feat_bound};
    }
  });
}

template <class T>
void hash_queries(const QueryBlocking<T>& blocking, int64_t b, int64_t h, int64_t group,
                  typename HashLane<T>::type* hashes) {
  const GridQueryInput<T>& in = blocking.in;
  const int64_t W = blocking.kernels.width;
  for (int64_t s = 0; s < blocking.group_count(group); ++s) {
    const int64_t strip = group * blocking.group + s;
    const int64_t first = strip / blocking.strips * blocking.columns + strip % blocking.strips * W;
    for (int64_t lane = 0; lane < W; ++lane)  // lanes without a query have some hash, too
      hashes[s * W + lane] = in.dropout.query_hash((b * in.heads + h) * in.queries + first + lane);
  }
}

#define PF_INSTANTIATE(T)           \
  template struct QueryBlocking<T>; \
  template struct PackedKeys<T>;    \
  template void hash_queries<T>(const QueryBlocking<T>&, int64_t, int64_t, int64_t, typename HashLane<T>::type*);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace perceiver_fast
