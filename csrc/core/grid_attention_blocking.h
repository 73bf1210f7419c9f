// What the forward and the backward driver of grid attention share: blocks of queries, boxes of tokens, packing.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "grid_attention.h"
#include "grid_attention_block.h"
#include "grid_attention_pack.h"
#include "token_terms.h"

namespace perceiver_fast {

// Exponents up to here need no shift: a sum of 2^24 terms 2^s |r x|, s up to kSafe and |r x| up to 2^40, does not overflow
// float, and terms that matter beside a sum of at least 2^-kSafe do not underflow. LayerNorm keeps |r x| below sqrt(C).
template <class T>
constexpr double kSafe = sizeof(T) == 8 ? 400 : 60;

template <class T>
struct GridBlocking {
  const GridAttentionInput<T>& in;
  const GridAttentionKernels<T>& kernels;
  int64_t rows, columns, tokens, length, blocks;  // length is L; blocks of `lanes` queries per batch element

  explicit GridBlocking(const GridAttentionInput<T>& input)
      : in(input), kernels(grid_attention_kernels<T>(active_isa())), rows(1), columns(input.sizes.back()) {
    for (size_t a = 0; a + 1 < input.sizes.size(); ++a) rows *= input.sizes[a];
    tokens = rows * columns;
    length = std::accumulate(input.sizes.begin(), input.sizes.end(), input.features);
    blocks = (input.queries + kernels.lanes - 1) / kernels.lanes;
  }

  const T* q(int64_t b) const { return in.q + b * in.q_batch_stride; }

  int64_t token_batch(int64_t b) const { return b / in.heads; }

  TokenBox<T> box(const PackedTokens<T>& packed, const TokenTerms<T>& terms, int64_t b) const {
    const int64_t tokens_of = token_batch(b), row = terms.row(b);
    const bool by_token = !terms.empty() && (in.inverted || in.dropout);
    return {packed.data.get() + tokens_of * tokens * (in.features + 2),
            in.features,
            int64_t(in.sizes.size()) - 1,
            in.sizes.data(),
            columns,
            0,
            rows,
            0,
            columns,
            in.mask != nullptr && !packed.all_masked[tokens_of],
            by_token ? terms.shift.data() + row : nullptr,
            by_token ? terms.weight.data() + row : nullptr,
            by_token ? terms.delta.data() + row : nullptr,
            by_token ? terms.delta_low.data() + row : nullptr,
            terms.hashes.empty() ? nullptr : terms.hashes.data(),
            in.dropout.threshold};
  }
};

// Masked tokens have a bias of -inf in their packed records. Kernels that take terms by token need it there too.
template <class T>
TokenTerms<T> grid_token_terms(const GridBlocking<T>& blocking, const double* token_lse) {
  const GridAttentionInput<T>& in = blocking.in;
  const bool needed = in.inverted || in.dropout;
  const uint8_t* mask = needed ? in.mask : nullptr;
  return TokenTerms<T>(in.batch / in.heads, in.heads, blocking.tokens, mask, token_lse, in.dropout);
}

// Number of parts, about `wanted` and at least one, that a box is cut into: by rows while there are enough of them.
inline int64_t part_count(int64_t rows, int64_t columns, int64_t wanted) {
  const int64_t down = std::max<int64_t>(1, std::min(rows, wanted));
  return down * std::max<int64_t>(1, std::min(columns, (wanted + down - 1) / down));
}

// Cuts a whole box into `parts` equal parts; `parts` comes from part_count.
template <class T>
TokenBox<T> part_of(TokenBox<T> box, int64_t part, int64_t parts) {
  const int64_t rows = box.row_end, columns = box.col_end, down = std::min(rows, parts), across = parts / down;
  const int64_t i = part / across, j = part % across;
  box.row_begin = rows * i / down;
  box.row_end = rows * (i + 1) / down;
  box.col_begin = columns * j / across;
  box.col_end = columns * (j + 1) / across;
  return box;
}

// Parts to cut each query block's tokens into, so that every thread has work (few latents, many tokens).
// Depends on shape and thread count alone: the same run gives the same bits.
template <class T>
int64_t token_parts(const GridBlocking<T>& blocking, int64_t block_tasks, int threads) {
  if (block_tasks % threads == 0 || block_tasks >= 8 * threads) return 1;
  const int64_t wanted = (4 * threads + block_tasks - 1) / block_tasks;
  return part_count(blocking.rows, blocking.columns, std::min<int64_t>(wanted, blocking.tokens / 2048));
}

// Accumulators of a query block: [L][lanes] sums, [lanes] sum of p, [lanes] of what dropout kept of p, and [lanes] the
// shift the p were taken at.
// `work(task, part, parts, sums)` fills them for one part of the tokens; the parts are added up in order, and
// `finish(task, sums)` turns the total into results. One task is one query block of one batch element.
template <class T, class Work, class Finish>
void for_each_block(const GridBlocking<T>& blocking, const Parallel& parallel, Work work, Finish finish) {
  const int64_t lanes = blocking.kernels.lanes, added = (blocking.length + 2) * lanes, size = added + lanes;
  const int64_t tasks = blocking.in.batch * blocking.blocks;
  const int64_t parts = token_parts(blocking, tasks, parallel.threads);
  if (parts == 1) {
    parallel.run(tasks, [&](int64_t begin, int64_t end) {
      Aligned<T> sums(size);
      for (int64_t task = begin; task < end; ++task) {
        work(task, 0, 1, sums.get());
        finish(task, sums.get());
      }
    });
    return;
  }
  Aligned<T> sums(tasks * parts * size);
  parallel.run(tasks * parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i / parts, i % parts, parts, sums.get() + i * size);
  });
  parallel.run(tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      T* first = sums.get() + task * parts * size;
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = 0; i < added; ++i) first[i] += first[part * size + i];
      finish(task, first);
    }
  });
}

// The queries of one block, packed.
template <class T>
struct QueryTable {
  int64_t b, first, count;  // batch element, first query, number of queries (at most `lanes`)
  Aligned<T> q;
  std::vector<typename HashLane<T>::type> hashes;  // of dropout

  QueryTable(const GridBlocking<T>& blocking, const PackedTokens<T>& packed, int64_t task)
      : b(task / blocking.blocks),
        first(task % blocking.blocks * blocking.kernels.lanes),
        count(std::min<int64_t>(blocking.kernels.lanes, blocking.in.queries - first)),
        q(blocking.length * blocking.kernels.lanes) {
    const int lanes = blocking.kernels.lanes;
    const std::vector<T> log2e(lanes, T(kLog2OfE));  // the kernels take exponents of two
    const int64_t rows = packed.all_masked[blocking.token_batch(b)] ? 0 : count;  // zero queries attend uniformly
    rows_to_lanes(blocking.q(b) + first * blocking.length, blocking.length, rows, blocking.length, lanes, log2e.data(),
                  q.get());
    if (!blocking.in.dropout) return;
    for (int lane = 0; lane < lanes; ++lane)
      hashes.push_back(blocking.in.dropout.query_hash(b * blocking.in.queries + first + lane));
  }
};

// The integer that brings logits up to `largest` (log2 units) into the range of T; none for ordinary ones.
template <class T>
T shift_for(double largest) {
  return std::abs(largest) <= kSafe<T> ? T(0) : T(-std::nearbyint(largest));
}

}  // namespace perceiver_fast
