// Forward of grid attention: softmax over the tokens of a grid, and the sums that stand in for P times the tokens.
//
//   S[n, m] = r_m (q_feat[n] . x_m + sum_a q_axes_a[n, i_a(m)])      o[n] = sum_m P[n, m] r_m [x_m ; onehot ; ..]
//
// Tokens are packed once, as records (r, r x, bias). A task is a block of queries of one batch element, one query a
// vector lane: it walks all tokens, or a part of them where there are too few tasks for the threads, and adds to sums
// of its own; parts are added up in order. Exponents are shifted by an upper bound of the logits where that is needed
// at all; if some query's sum vanished because the bound was loose, its block is run again with the exact maximum.
//
// Inverted attention sums exp(S) over the queries first: there the tokens are shared out, and the lanes are tokens.
//
// Memory: F + 2 numbers a token, shared by all; a task has L + 3 vectors of sums and as many of queries, and with parts
// all parts' sums exist at once. Dropout and inverted attention need four numbers more a token.
#include "grid_attention.h"

#include "grid_attention_blocking.h"

namespace perceiver_fast {

namespace {

// Runs one part of a block's forward into `sums`, at the shifts in their last row.
template <class T>
void forward_part(const GridBlocking<T>& blocking, const TokenBox<T>& box, const QueryTable<T>& table, T* sums) {
  const int64_t lanes = blocking.kernels.lanes, added = (blocking.length + 2) * lanes;
  std::fill(sums, sums + added, T(0));
  const Aligned<T> scratch(2 * (blocking.in.features + 1) * lanes);
  blocking.kernels.forward(
      box, {table.q.get(), sums + added, nullptr, nullptr, nullptr, nullptr, sums, scratch.get(), table.hashes.data()});
}

// The bound was so loose that the sum of some query (nearly) vanished: shift by the exact maximum instead.
template <class T>
void forward_exactly(const GridBlocking<T>& blocking, const PackedTokens<T>& packed, const TokenTerms<T>& terms,
                     int64_t task, T* sums) {
  const QueryTable<T> table(blocking, packed, task);
  const TokenBox<T> box = blocking.box(packed, terms, table.b);
  const int lanes = blocking.kernels.lanes;
  T* shift = sums + (blocking.length + 2) * lanes;
  std::fill(shift, shift + lanes, -std::numeric_limits<T>::infinity());
  blocking.kernels.maximum(box, table.q.get(), shift);
  for (int lane = 0; lane < lanes; ++lane) shift[lane] = shift_for<T>(shift[lane]);
  forward_part(blocking, box, table, sums);
}

// Inverted attention: logarithm of the softmax's denominator of every token over the queries.
template <class T>
void token_statistics(const GridBlocking<T>& blocking, const PackedTokens<T>& packed, double* token_lse,
                      const Parallel& parallel) {
  const GridAttentionInput<T>& in = blocking.in;
  const int64_t N = in.queries, M = blocking.tokens, L = blocking.length;
  const TokenTerms<T> none(in.batch, 1, M, nullptr, nullptr, Dropout(0, 0));
  const int64_t parts = part_count(blocking.rows, blocking.columns, std::min<int64_t>(4 * parallel.threads, M / 512));
  const Aligned<T> q(in.batch * N * L), maximum(in.batch * M), sum(in.batch * M);
  for (int64_t b = 0; b < in.batch; ++b)
    for (int64_t i = 0; i < N * L; ++i) q.get()[b * N * L + i] = blocking.q(b)[i] * T(kLog2OfE);
  parallel.run(in.batch * parts, [&](int64_t begin, int64_t end) {
    const Aligned<T> row_sums(2 * N), columns(in.features * blocking.kernels.lanes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts;
      TokenGradient<T> queries{};
      queries.queries = N;
      queries.length = L;
      queries.q = q.get() + b * N * L;
      queries.row_sums = row_sums.get();
      queries.columns = columns.get();
      blocking.kernels.token_sums(part_of(blocking.box(packed, none, b), task % parts, parts), queries,
                                  maximum.get() + b * M, sum.get() + b * M);
    }
  });
  parallel.run(in.batch * M, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      token_lse[i] = (std::log2(double(sum.get()[i])) + double(maximum.get()[i])) / kLog2OfE;
  });
}

}  // namespace

template <class T>
void grid_attention_forward(const GridAttentionInput<T>& in, const GridAttentionOutput<T>& out,
                            const Parallel& parallel) {
  const GridBlocking<T> blocking(in);
  const PackedTokens<T> packed = pack_tokens(in, blocking.tokens, parallel);
  if (in.inverted) token_statistics(blocking, packed, out.token_lse, parallel);
  const TokenTerms<T> terms = grid_token_terms(blocking, in.inverted ? out.token_lse : nullptr);
  const int64_t L = blocking.length, lanes = blocking.kernels.lanes;

  const auto work = [&](int64_t task, int64_t part, int64_t parts, T* sums) {
    const QueryTable<T> table(blocking, packed, task);
    T* shift = sums + (L + 2) * lanes;
    std::fill(shift, shift + lanes, T(0));  // inverted: divided by the tokens' denominators, weights are at most one
    if (!in.inverted && !packed.all_masked[blocking.token_batch(table.b)]) {
      bound_logits(table.q.get(), in.sizes, in.features, int(lanes), packed.bounds[blocking.token_batch(table.b)],
                   shift);
      for (int64_t lane = 0; lane < lanes; ++lane) shift[lane] = shift_for<T>(shift[lane]);
    }
    forward_part(blocking, part_of(blocking.box(packed, terms, table.b), part, parts), table, sums);
  };
  const auto finish = [&](int64_t task, T* sums) {
    const int64_t b = task / blocking.blocks, first = task % blocking.blocks * lanes;
    const int64_t count = std::min<int64_t>(lanes, in.queries - first);
    const T *total = sums + L * lanes, *kept = total + lanes, *shift = kept + lanes;
    const T least = T(std::exp2(-kSafe<T>));
    if (!in.inverted && std::any_of(total, total + count, [&](T sum) { return !(sum >= least); }))
      forward_exactly(blocking, packed, terms, task, sums);
    std::vector<T> factor(lanes);
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t row = b * in.queries + first + lane;
      const double sum = in.inverted ? std::max(double(total[lane]), kInvertedEps) : double(total[lane]);
      factor[lane] = T(in.dropout ? in.dropout.scale() / sum : 1 / sum);
      if (in.inverted)
        out.lse[row] = inverted_lse<T>(total[lane]);
      else
        out.lse[row] = packed.all_masked[blocking.token_batch(b)] ? kEmptyLse
                                                                  : std::log(sum) - double(shift[lane]) / kLog2OfE;
      if (out.kept != nullptr) out.kept[row] = factor[lane] * (in.dropout ? kept[lane] : total[lane]);
    }
    lanes_to_rows(sums, L, lanes, factor.data(), count, out.o + (b * in.queries + first) * L, L);
  };
  for_each_block(blocking, parallel, work, finish);
  add_spoiled(in, packed, blocking.tokens, out.o);
}

template void grid_attention_forward<float>(const GridAttentionInput<float>&, const GridAttentionOutput<float>&,
                                            const Parallel&);
template void grid_attention_forward<double>(const GridAttentionInput<double>&, const GridAttentionOutput<double>&,
                                             const Parallel&);

}  // namespace perceiver_fast
