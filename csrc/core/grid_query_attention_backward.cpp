// Backward of grid_query_attention, from weights that are computed anew.
//
// Groups of strips are tasks as in the forward, and write the gradients of their queries. Gradients of tables, biases
// and values are sums over queries: the groups of a batch element are cut into parts, which have sums of their own,
// and these are added up in order. Their number depends on shapes alone, so no bit depends on the number of threads.
// Within a part about kSumQueries queries are added one after the other, and then to the part's sum: roundings do not
// pile up.
//
// Memory: the packed keys; for every part sums like packed tables and values, kMostSums bytes in all unless two
// parts are more; and for every thread such sums and two tiles of all keys for each strip of a group.
#include "grid_query_attention.h"

#include "grid_query_attention_pack.h"
#include "token_terms.h"

namespace perceiver_fast {

namespace {

constexpr int64_t kMostParts = 32, kMostSums = 256 << 20, kSumQueries = 4096;

// Where the sums of one head stand.
template <class T>
struct KeySums {
  int64_t columns, outer, extra, v, size;

  explicit KeySums(const QueryBlocking<T>& blocking) {
    const GridQueryInput<T>& in = blocking.in;
    columns = 0;
    outer = in.sizes.empty() ? 0 : blocking.strips * blocking.kernels.width * in.keys;
    extra = outer + blocking.outer_total * in.keys;
    v = extra + blocking.padded(in.features + 2) * in.keys;
    size = v + blocking.padded(in.channels) * in.keys;
  }
};

// From the sums of a head to its gradients.
template <class T>
void unpack(const QueryBlocking<T>& blocking, const PackedKeys<T>& keys, int64_t head, const T* sums,
            const GridQueryGradients<T>& grads) {
  const GridQueryInput<T>& in = blocking.in;
  const KeySums<T> at(blocking);
  const std::vector<int64_t>& kept = keys.kept[head / in.heads];
  const int64_t N = in.keys, F = in.features, C = in.channels, L = blocking.length, W = blocking.kernels.width;
  const int64_t count = int64_t(kept.size()), extra = blocking.padded(F + 2), pad = blocking.padded(C);
  std::fill_n(grads.tables + head * N * L, N * L, T(0));  // of masked keys
  std::fill_n(grads.v + head * N * C, N * C, T(0));
  if (grads.bias != nullptr) std::fill_n(grads.bias + head * N, N, T(0));
  for (int64_t n = 0; n < count; ++n) {
    const int64_t key = head * N + kept[n];
    T* row = grads.tables + key * L;
    const T* sums_extra = sums + at.extra + n * extra;
    std::copy_n(sums_extra, F, row);
    if (grads.bias != nullptr) grads.bias[key] = sums_extra[F + 1];
    for (int64_t i = 0; i < blocking.outer_total; ++i) row[F + i] = sums[at.outer + i * count + n];
    blocking.for_merged([&](int64_t size, int64_t offset, int64_t lasts) {
      for (int64_t j = 0; j < blocking.columns; ++j)
        row[offset + j / lasts % size] += sums[at.columns + (j / W * count + n) * W + j % W];
    });
    std::copy_n(sums + at.v + n * pad, C, grads.v + key * C);
  }
}

}  // namespace

template <class T>
void grid_query_attention_backward(const GridQueryInput<T>& in, const T* d_o, const double* lse,
                                   const GridQueryGradients<T>& grads, const Parallel& parallel) {
  const auto& kernels = grid_query_attention_kernels<T>(active_isa());
  const int64_t H = in.heads, C = in.channels, F = in.features, M = in.queries, N = in.keys, W = kernels.width;
  const QueryBlocking<T> blocking(in, C > 2 * kernels.lanes ? kernels.backward_scratch(1, F, C, N) / 4
                                                            : kernels.backward_scratch(1, F, C, N));
  const PackedKeys<T> keys(blocking, false, parallel);
  const KeySums<T> at(blocking);
  const int64_t group = blocking.group, groups = blocking.groups, size = H * at.size;
  const int64_t fit = kMostSums / int64_t(sizeof(T)) / std::max<int64_t>(1, in.batch * size);
  const int64_t parts = std::max<int64_t>(1, std::min({groups, kMostParts, std::max<int64_t>(2, fit)}));
  const int64_t flush = std::max<int64_t>(1, kSumQueries / (group * W));
  const int64_t query_stride = in.sum_heads ? C : H * C;
  const bool token_grads = (F > 0 && grads.feat != nullptr) || grads.scale != nullptr;
  const Aligned<T> totals(in.batch * parts * size);
  parallel.run(in.batch * parts, [&](int64_t begin, int64_t end) {
    const Aligned<T> x(group * (F + 1) * W), d_x(group * (F + 1) * W), sums(size);
    const Aligned<T> scratch(kernels.backward_scratch(group, F, C, N));
    std::vector<typename HashLane<T>::type> hashes(in.dropout ? group * W : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts, part = task % parts, last = groups * (part + 1) / parts;
      const QueryRows<T> rows = blocking.rows_of(b, keys.uniform[b]);
      T* total = totals.get() + task * size;
      std::fill_n(total, size, T(0));
      for (int64_t first = groups * part / parts; first < last; first += flush) {
        std::fill_n(sums.get(), size, T(0));
        for (int64_t index = first; index < std::min(first + flush, last); ++index) {
          const QueryGroup<T> queries{index * group, blocking.group_count(index), x.get(), x.get() + group * F * W};
          T *sums_x = d_x.get(), *sums_r = sums_x + group * F * W;
          kernels.pack(rows, queries);
          std::fill_n(sums_x, group * (F + 1) * W, T(0));
          for (int64_t h = 0; h < H; ++h) {
            if (in.dropout) hash_queries(blocking, b, h, index, hashes.data());
            const QueryKeys<T>& head = keys.heads[b * H + h];
            T* to = sums.get() + h * at.size;
            kernels.backward(rows, head, queries,
                             {C, d_o + b * M * query_stride + (in.sum_heads ? 0 : h * C), query_stride,
                              lse + (b * H + h) * M, head.count == 1 || keys.uniform[b], hashes.data(),
                              in.dropout.threshold, T(in.dropout.scale()), to + at.outer, to + at.columns,
                              to + at.extra, to + at.v, token_grads ? sums_x : nullptr,
                              token_grads ? sums_r : nullptr, scratch.get()});
          }
          if (token_grads)
            kernels.finish(rows, queries, sums_x, sums_r, grads.feat + b * M * F,
                           grads.scale == nullptr ? nullptr : grads.scale + b * M);
        }
        for (int64_t i = 0; i < size; ++i) total[i] += sums.get()[i];
      }
    }
  });
  parallel.run(in.batch * H, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      T* total = totals.get() + head / H * parts * size + head % H * at.size;
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = 0; i < at.size; ++i) total[i] += total[part * size + i];
      unpack(blocking, keys, head, total, grads);
    }
  });
}

template void grid_query_attention_backward<float>(const GridQueryInput<float>&, const float*, const double*,
                                                   const GridQueryGradients<float>&, const Parallel&);
template void grid_query_attention_backward<double>(const GridQueryInput<double>&, const double*, const double*,
                                                    const GridQueryGradients<double>&, const Parallel&);

}  // namespace perceiver_fast
