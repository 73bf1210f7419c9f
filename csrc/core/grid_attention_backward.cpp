// Backward of grid attention: gradients of the queries block by block, then of the tokens part by part.
//
//   dS = P (r u - delta)      u[n, m] = d_o[n] . [x_m ; onehot(i_1) ; ..]      delta[n] = o[n] . d_o[n] - d_lse[n]
//
// dq is a sum over tokens: blocks of queries are tasks, as in the forward. dfeat and dscale are sums over queries: the
// tokens of every batch element are cut into parts, which are the tasks, and a vector's lanes are tokens. So every
// result has one writer. Weights are computed again from lse, by the forward's operations in the forward's order.
//
// Memory: the forward's, four numbers a query, and for the gradients of tokens a scaled copy of q and of d_o.
#include "grid_attention.h"
#include "grid_attention_blocking.h"

namespace perceiver_fast {

namespace {

// What the backward needs of every query, [B * N] each: P = 2^(S log2(e) + shift) * weight and dS = P (r u - delta).
// `delta_low` is the rounding error of delta. With dropout, `bonus` (the gradient of the sum of the weights) is added to u before dropped weights are left out, and
// u and bonus are multiplied by `keep_scale`.
template <class T>
struct QueryStatistics {
  std::vector<T> shift, weight, delta, delta_low, bonus;
  T keep_scale;

  T grad_weight(int64_t row) const { return weight[row] * keep_scale; }
};

// In double. Several sums, so that a compiler may compute them side by side.
template <class T>
double dot(int64_t count, const T* a, const T* b) {
  constexpr int64_t kSums = 8;
  double sums[kSums] = {}, total = 0;
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int64_t k = 0; k < kSums; ++k) sums[k] += double(a[i + k]) * double(b[i + k]);
  for (; i < count; ++i) total += double(a[i]) * double(b[i]);
  for (double sum : sums) total += sum;
  return total;
}

template <class T>
QueryStatistics<T> query_statistics(const GridBlocking<T>& blocking, const PackedTokens<T>& packed,
                                    const GridAttentionOutput<T>& out, const GridAttentionGradient<T>& grad,
                                    const Parallel& parallel) {
  const GridAttentionInput<T>& in = blocking.in;
  const int64_t N = in.queries, rows = in.batch * N, L = blocking.length;
  const std::vector<T> zeros(rows);
  QueryStatistics<T> stats{zeros, zeros, zeros, zeros, zeros, T(in.dropout ? in.dropout.scale() : 1)};
  parallel.run(rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool uniform = packed.all_masked[blocking.token_batch(i / N)];
      const bool constant = in.inverted && is_clamped(out.lse[i]);
      const double lse2 = uniform    ? std::log2(double(blocking.tokens))
                          : constant ? std::log2(kInvertedEps)
                                     : out.lse[i] * kLog2OfE;
      stats.shift[i] = in.inverted ? T(0) : shift_for<T>(lse2);
      stats.weight[i] = T(std::exp2(-lse2 - double(stats.shift[i])));
      double delta = 0;
      // A clamped normaliser is a constant, and so are uniform weights.
      if (!constant && !uniform) {
        delta = dot(L, grad.o + i * L, out.o + i * L);
        if (grad.kept != nullptr) delta += double(grad.kept[i]) * double(out.kept[i]);
      }
      if (grad.lse != nullptr && !uniform) delta -= constant ? grad.lse[i] * clamped_share(out.lse[i]) : grad.lse[i];
      if (grad.kept != nullptr && in.dropout) stats.bonus[i] = grad.kept[i] * stats.grad_weight(i);
      if (grad.kept != nullptr && !in.dropout) delta -= double(grad.kept[i]);
      stats.delta[i] = T(delta);
    }
  });
  return stats;
}

// Runs body(box, queries, b) for every part of the tokens of every batch element; `queries` has the outputs left out.
template <class T, class Body>
void for_each_part(const GridBlocking<T>& blocking, const PackedTokens<T>& packed, const TokenTerms<T>& terms,
                   const QueryStatistics<T>& stats, const T* d_o, const Parallel& parallel, const Body& body) {
  const GridAttentionInput<T>& in = blocking.in;
  const int64_t N = in.queries, F = in.features, M = blocking.tokens, L = blocking.length;
  const Aligned<T> q(in.batch * N * L), grad(in.batch * N * L);
  std::vector<T> delta(in.batch * N), delta_low(in.batch * N);
  std::vector<uint32_t> hashes(in.dropout ? in.batch * N : 0);
  parallel.run(in.batch * N, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = blocking.q(i / N) + i % N * L;
      const T weight = stats.grad_weight(i);
      const bool uniform = packed.all_masked[blocking.token_batch(i / N)];
      for (int64_t l = 0; l < L; ++l) {
        q.get()[i * L + l] = uniform ? T(0) : row[l] * T(kLog2OfE);
        grad.get()[i * L + l] = d_o[i * L + l] * weight;
      }
      delta[i] = stats.delta[i] * stats.weight[i];
      delta_low[i] = stats.delta_low[i] * stats.weight[i];
      if (in.dropout) hashes[i] = in.dropout.query_hash(i);
    }
  });
  const int64_t parts = part_count(blocking.rows, blocking.columns, std::min<int64_t>(4 * parallel.threads, M / 512));
  parallel.run(in.batch * parts, [&](int64_t begin, int64_t end) {
    const Aligned<T> row_sums(2 * N), columns(3 * F * blocking.kernels.lanes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts, n = b * N;
      body(part_of(blocking.box(packed, terms, b), task % parts, parts),
           TokenGradient<T>{N, L, q.get() + n * L, grad.get() + n * L, stats.shift.data() + n, delta.data() + n,
                            delta_low.data() + n, stats.bonus.data() + n, hashes.empty() ? nullptr : hashes.data() + n,
                            in.feat + blocking.token_batch(b) * M * F, nullptr, nullptr, row_sums.get(), columns.get()},
           b);
    }
  });
}

// What inverted attention subtracts from the gradients of its weights: of every query, since it normalises over the
// tokens, and of every token, since its softmax is over the queries. Each is a sum of two numbers, the second the rounding
// error of the first: where one weight is all there is, the difference is nothing but rounding otherwise, and a query that
// hardly owns its tokens multiplies it by up to 1 / kInvertedEps. `work` sums P (u - delta) over the tokens.
template <class T, class Work>
void inverted_deltas(const GridBlocking<T>& blocking, const PackedTokens<T>& packed, const GridAttentionOutput<T>& out,
                     const GridAttentionGradient<T>& grad, const Work& work, QueryStatistics<T>& stats,
                     TokenTerms<T>& terms, const Parallel& parallel) {
  const int64_t N = blocking.in.queries, lanes = blocking.kernels.lanes;
  const auto query_error = [&](int64_t task, T* sums) {
    const int64_t first = task % blocking.blocks * lanes, row = task / blocking.blocks * N + first;
    for (int64_t lane = 0; lane < std::min<int64_t>(lanes, N - first); ++lane) {
      const T wanted = grad.lse == nullptr ? T(0) : T(grad.lse[row + lane]);
      if (!is_clamped(out.lse[row + lane]))
        stats.delta_low[row + lane] = sums[blocking.length * lanes + lane] - wanted;
    }
  };
  for_each_block(blocking, parallel, work, query_error);
  for (int pass = 0; pass < 2; ++pass)
    for_each_part(blocking, packed, terms, stats, grad.o, parallel,
                  [&](const TokenBox<T>& box, const TokenGradient<T>& queries, int64_t b) {
                    T* sum = (pass == 0 ? terms.delta : terms.delta_low).data() + terms.row(b);
                    blocking.kernels.token_delta(box, queries, sum);
                  });
}

// A masked token has no gradient, though what its weights of zero are multiplied by may not be finite.
template <class T>
void clear_masked(const GridBlocking<T>& blocking, const PackedTokens<T>& packed, T* dfeat, T* dscale,
                  const Parallel& parallel) {
  const GridAttentionInput<T>& in = blocking.in;
  const int64_t M = blocking.tokens, F = in.features;
  if (in.mask == nullptr) return;
  parallel.run(in.batch, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * M; i < end * M; ++i) {
      const int64_t b = blocking.token_batch(i / M);
      if (in.mask[b * M + i % M] || packed.all_masked[b]) continue;
      dscale[i] = 0;
      std::fill_n(dfeat + i * F, F, T(0));
    }
  });
}

}  // namespace

template <class T>
void grid_attention_backward(const GridAttentionInput<T>& in, const GridAttentionOutput<T>& out,
                             const GridAttentionGradient<T>& grad, T* dq, T* dfeat, T* dscale,
                             const Parallel& parallel) {
  const GridBlocking<T> blocking(in);
  const PackedTokens<T> packed = pack_tokens(in, blocking.tokens, parallel);
  TokenTerms<T> terms = grid_token_terms(blocking, in.inverted ? out.token_lse : nullptr);
  const int64_t N = in.queries, L = blocking.length, M = blocking.tokens, F = in.features,
                lanes = blocking.kernels.lanes;
  QueryStatistics<T> stats = query_statistics(blocking, packed, out, grad, parallel);
  // The output's gradient, delta and bonus are multiplied by the weight of P here, so that the loop need not do it.
  const auto work = [&](int64_t task, int64_t part, int64_t parts, T* sums) {
    const QueryTable<T> table(blocking, packed, task);
    const int64_t row = table.b * N + table.first;
    const Aligned<T> d_o(L * lanes), scratch(2 * (F + 1) * lanes);
    std::vector<T> shift(lanes), delta(lanes), delta_low(lanes), bonus(lanes), weight(lanes);
    for (int64_t lane = 0; lane < table.count; ++lane) {
      shift[lane] = stats.shift[row + lane];
      delta[lane] = stats.delta[row + lane] * stats.weight[row + lane];
      delta_low[lane] = stats.delta_low[row + lane] * stats.weight[row + lane];
      bonus[lane] = stats.bonus[row + lane];
      weight[lane] = stats.grad_weight(row + lane);
    }
    rows_to_lanes(grad.o + row * L, L, table.count, L, lanes, weight.data(), d_o.get());
    std::fill(sums, sums + (L + 3) * lanes, T(0));
    blocking.kernels.backward(
        part_of(blocking.box(packed, terms, table.b), part, parts),
        {table.q.get(), shift.data(), d_o.get(), delta.data(), delta_low.data(), bonus.data(), sums, scratch.get(),
         table.hashes.data()});
  };
  if (in.inverted) inverted_deltas(blocking, packed, out, grad, work, stats, terms, parallel);
  // Over the tokens dS sums to d_lse. What it sums to beside that is the error of delta, which was computed from
  // rounded outputs; since P sums to one, it adds error * o to dq. Taking that out leaves an error of second order, so
  // that a query with nearly all its weight on one token gets its tiny gradients and not that error. With dropout the
  // sum of P r [x ; onehot] is not o, so a block where the error would show is run again with the corrected delta.
  // (Inverted attention's dS sums to zero over the queries instead.)
  const auto errors = [&](int64_t task, T* sums) {
    const int64_t b = task / blocking.blocks, first = task % blocking.blocks * lanes;
    bool shows = false;
    for (int64_t lane = 0; lane < std::min<int64_t>(lanes, N - first); ++lane) {
      const int64_t row = b * N + first + lane;
      const bool none = grad.lse == nullptr || packed.all_masked[blocking.token_batch(b)];
      T& error = sums[L * lanes + lane];
      error -= none ? T(0) : T(grad.lse[row]);
      stats.delta_low[row] = error;
      T largest_o = 0, largest = 0;
      for (int64_t l = 0; in.dropout && l < L; ++l) {
        largest_o = std::max(largest_o, std::abs(out.o[row * L + l]));
        largest = std::max(largest, std::abs(sums[l * lanes + lane]));
      }
      shows |= std::abs(error) * largest_o > 64 * std::numeric_limits<T>::epsilon() * largest;
    }
    return shows;
  };
  const auto finish = [&](int64_t task, T* sums) {
    const int64_t b = task / blocking.blocks, first = task % blocking.blocks * lanes,
                  tokens_of = blocking.token_batch(b);
    const int64_t count = std::min<int64_t>(lanes, N - first);
    if (!in.inverted && errors(task, sums) && in.dropout) work(task, 0, 1, sums);
    // Weights that do not depend on the queries: no gradient.
    if (in.dropout && !in.inverted &&
        (packed.all_masked[tokens_of] || (packed.constant[tokens_of] && grad.lse == nullptr)))
      std::fill(sums, sums + L * lanes, T(0));
    const std::vector<T> factor(lanes, T(1));
    lanes_to_rows(sums, L, lanes, factor.data(), count, dq + (b * N + first) * L, L);
    for (int64_t lane = 0; !in.inverted && lane < count; ++lane) {
      const int64_t row = b * N + first + lane;
      T* of_row = dq + row * L;
      const T* o = out.o + row * L;
      if (packed.all_masked[tokens_of]) {
        std::fill_n(of_row, L, T(0));
      } else if (packed.constant[tokens_of] && !in.dropout) {
        const T wanted = grad.lse == nullptr ? T(0) : T(grad.lse[row]);
        for (int64_t l = 0; l < L; ++l) of_row[l] = wanted * o[l];
      } else if (!in.dropout) {
        const T error = sums[L * lanes + lane];
        for (int64_t l = 0; l < L; ++l) of_row[l] -= error * o[l];
      }
    }
  };
  for_each_block(blocking, parallel, work, finish);
  if (dfeat == nullptr) return;
  for_each_part(blocking, packed, terms, stats, grad.o, parallel,
                [&](const TokenBox<T>& box, TokenGradient<T> queries, int64_t b) {
                  queries.dfeat = dfeat + b * M * F;
                  queries.dscale = dscale + b * M;
                  blocking.kernels.token_gradient(box, queries);
                });
  clear_masked(blocking, packed, dfeat, dscale, parallel);
}

#define PF_INSTANTIATE(T)                                                                               \
  template void grid_attention_backward<T>(const GridAttentionInput<T>&, const GridAttentionOutput<T>&, \
                                           const GridAttentionGradient<T>&, T*, T*, T*, const Parallel&);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace perceiver_fast
