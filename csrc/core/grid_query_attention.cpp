// Forward of grid_query_attention: softmax over the keys, for every query of a grid or of points.
//
//   S[m, n] = r_m (tables[n, :F] . x_m + sum_a tables_a[n, i_a(m)]) + bias[n]      o[m] = sum_n P[m, n] v[n]
//
// Queries are cut into strips, two vectors wide, and some strips are a group, which is a task: it walks the heads and
// their keys in order. No result depends on the number of threads.
//
// Values of few channels are summed up in registers, where S and P are nowhere else; of many channels, and with
// dropout, P is a tile of a block of keys, and its product with V another (tile_gemm.h).
//
// Memory: the packed keys (grid_query_attention_pack.cpp), and tiles for every thread, about a quarter megabyte.
#include "grid_query_attention.h"

#include "grid_query_attention_pack.h"
#include "token_terms.h"

namespace perceiver_fast {

template <class T>
void grid_query_attention_forward(const GridQueryInput<T>& in, T* o, int64_t o_batch_stride, double* lse,
                                  const Parallel& parallel) {
  const auto& kernels = grid_query_attention_kernels<T>(active_isa());
  const int64_t H = in.heads, C = in.channels, F = in.features, M = in.queries, W = kernels.width;
  const QueryBlocking<T> blocking(in, kernels.forward_scratch(1, F, C) + F * W);
  const PackedKeys<T> keys(blocking, C > kernels.few || in.dropout, parallel);
  const int64_t group = blocking.group, query_stride = in.sum_heads ? C : H * C;
  parallel.run(in.batch * blocking.groups, [&](int64_t begin, int64_t end) {
    const Aligned<T> x(group * (F + 1) * W), scratch(kernels.forward_scratch(group, F, C));
    std::vector<typename HashLane<T>::type> hashes(in.dropout ? group * W : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocking.groups, index = task % blocking.groups;
      const bool uniform = keys.uniform[b];
      const QueryRows<T> rows = blocking.rows_of(b, uniform);
      const QueryGroup<T> queries{index * group, blocking.group_count(index), x.get(), x.get() + group * F * W};
      kernels.pack(rows, queries);
      for (int64_t h = 0; h < H; ++h) {
        if (in.dropout) hash_queries(blocking, b, h, index, hashes.data());
        kernels.forward(rows, keys.heads[b * H + h], queries,
                        {C, o + b * o_batch_stride + (in.sum_heads ? 0 : h * C), query_stride, in.sum_heads && h > 0,
                         lse == nullptr || uniform ? nullptr : lse + (b * H + h) * M, hashes.data(),
                         in.dropout.threshold, T(in.dropout.scale()), scratch.get()});
      }
    }
  });
  for (int64_t b = 0; lse != nullptr && b < in.batch; ++b)
    if (keys.uniform[b]) std::fill_n(lse + b * H * M, H * M, kEmptyLse);
}

template void grid_query_attention_forward<float>(const GridQueryInput<float>&, float*, int64_t, double*,
                                                  const Parallel&);
template void grid_query_attention_forward<double>(const GridQueryInput<double>&, double*, int64_t, double*,
                                                   const Parallel&);

}  // namespace perceiver_fast
