#include "grid_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "grid_attention_block.h"
#include "grid_attention_pack.h"

namespace perceiver_fast {

#define PF_DECLARE(ISA)                                              \
  extern const GridAttentionKernels<float> grid_attention_##ISA##_f32; \
  extern const GridAttentionKernels<double> grid_attention_##ISA##_f64;
PF_DECLARE(baseline)
#if defined(__x86_64__)
PF_DECLARE(avx2)
PF_DECLARE(avx512)
#endif

template <>
const GridAttentionKernels<float>& grid_attention_kernels<float>(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return grid_attention_avx512_f32;
  if (isa == Isa::avx2) return grid_attention_avx2_f32;
#endif
  (void)isa;
  return grid_attention_baseline_f32;
}

template <>
const GridAttentionKernels<double>& grid_attention_kernels<double>(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return grid_attention_avx512_f64;
  if (isa == Isa::avx2) return grid_attention_avx2_f64;
#endif
  (void)isa;
  return grid_attention_baseline_f64;
}

namespace {

constexpr double kLog2e = 1.4426950408889634;

// Exponents up to here need no shift: sums of 2^24 powers of two times |r x| up to 2^40 do not overflow float, and
// terms that matter beside a sum of at least 2^-kSafe do not underflow. LayerNorm keeps |r x| below sqrt(C).
template <class T>
constexpr double kSafe = sizeof(T) == 8 ? 400 : 60;

template <class T>
struct Plan {
  const GridAttentionInput<T>& in;
  const GridAttentionKernels<T>& kernels;
  int64_t rows, columns, tokens, length, blocks;  // length is L; blocks of `lanes` queries per batch element

  explicit Plan(const GridAttentionInput<T>& input)
      : in(input), kernels(grid_attention_kernels<T>(active_isa())), rows(1), columns(input.sizes.back()) {
    for (size_t a = 0; a + 1 < input.sizes.size(); ++a) rows *= input.sizes[a];
    tokens = rows * columns;
    length = std::accumulate(input.sizes.begin(), input.sizes.end(), input.features);
    blocks = (input.queries + kernels.lanes - 1) / kernels.lanes;
  }

  const T* q(int64_t b) const { return in.q + b * in.q_batch_stride; }

  TokenBox<T> box(const PackedTokens<T>& packed, int64_t b) const {
    return {packed.data.get() + b * tokens * (in.features + 2), in.features, int64_t(in.sizes.size()) - 1,
            in.sizes.data(), columns, 0, rows, 0, columns, in.mask != nullptr && !packed.all_masked[b]};
  }
};

// Number of parts, about `wanted` and at least one, that a box is cut into: by rows while there are enough of them.
int64_t part_count(int64_t rows, int64_t columns, int64_t wanted) {
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
int64_t token_parts(const Plan<T>& plan, int64_t block_tasks, int threads) {
  if (block_tasks % threads == 0 || block_tasks >= 8 * threads) return 1;
  const int64_t wanted = (4 * threads + block_tasks - 1) / block_tasks;
  return part_count(plan.rows, plan.columns, std::min<int64_t>(wanted, plan.tokens / 2048));
}

// Accumulators of a query block: [L][lanes] sums, [lanes] sum of p, [lanes] the shift the p were taken at.
// `work(task, part, parts, sums)` fills them for one part of the tokens; the parts are added up in order, and
// `finish(task, sums)` turns the total into results. One task is one query block of one batch element.
template <class T, class Work, class Finish>
void for_each_block(const Plan<T>& plan, const Parallel& parallel, Work work, Finish finish) {
  const int64_t lanes = plan.kernels.lanes, added = (plan.length + 1) * lanes, size = added + lanes;
  const int64_t tasks = plan.in.batch * plan.blocks;
  const int64_t parts = token_parts(plan, tasks, parallel.threads);
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

  QueryTable(const Plan<T>& plan, const PackedTokens<T>& packed, int64_t task)
      : b(task / plan.blocks), first(task % plan.blocks * plan.kernels.lanes),
        count(std::min<int64_t>(plan.kernels.lanes, plan.in.queries - first)), q(plan.length * plan.kernels.lanes) {
    const int lanes = plan.kernels.lanes;
    const std::vector<T> log2e(lanes, T(kLog2e));  // the kernels take exponents of two
    const int64_t rows = packed.all_masked[b] ? 0 : count;  // zero queries attend uniformly
    pack_table(plan.q(b) + first * plan.length, plan.length, rows, plan.length, lanes, log2e.data(), q.get());
  }
};

// The integer that brings logits up to `largest` (log2 units) into the range of T; none for ordinary ones.
template <class T>
T shift_for(double largest) {
  return std::abs(largest) <= kSafe<T> ? T(0) : T(-std::nearbyint(largest));
}

// Runs one part of a block's forward into `sums`, at the shifts in their last row.
template <class T>
void forward_part(const Plan<T>& plan, const TokenBox<T>& box, const T* q, T* sums) {
  const int64_t lanes = plan.kernels.lanes, added = (plan.length + 1) * lanes;
  std::fill(sums, sums + added, T(0));
  const Aligned<T> scratch(2 * (plan.in.features + 1) * lanes);
  plan.kernels.forward(box, {q, sums + added, nullptr, nullptr, sums, scratch.get()});
}

// The bound was so loose that the sum of some query (nearly) vanished: shift by the exact maximum instead.
template <class T>
void forward_exactly(const Plan<T>& plan, const PackedTokens<T>& packed, int64_t task, T* sums) {
  const QueryTable<T> table(plan, packed, task);
  const TokenBox<T> box = plan.box(packed, table.b);
  const int lanes = plan.kernels.lanes;
  T* shift = sums + (plan.length + 1) * lanes;
  std::fill(shift, shift + lanes, -std::numeric_limits<T>::infinity());
  plan.kernels.maximum(box, table.q.get(), shift);
  for (int lane = 0; lane < lanes; ++lane) shift[lane] = shift_for<T>(shift[lane]);
  forward_part(plan, box, table.q.get(), sums);
}

// What the backward needs of every query, [B * N] each: P = 2^(S log2(e) + shift) * weight, dS = P (r u - delta).
template <class T>
struct QueryStatistics {
  std::vector<T> shift, weight, delta;
};

template <class T>
QueryStatistics<T> query_statistics(const Plan<T>& plan, const PackedTokens<T>& packed, const T* o, const double* lse,
                                    const T* d_o, const double* d_lse, const Parallel& parallel) {
  const int64_t N = plan.in.queries, rows = plan.in.batch * N, L = plan.length;
  QueryStatistics<T> stats{std::vector<T>(rows), std::vector<T>(rows), std::vector<T>(rows)};
  parallel.run(rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool uniform = packed.all_masked[i / N];
      const double lse2 = uniform ? std::log2(double(plan.tokens)) : lse[i] * kLog2e;
      stats.shift[i] = shift_for<T>(lse2);
      stats.weight[i] = T(std::exp2(-lse2 - double(stats.shift[i])));
      double delta = d_lse == nullptr || uniform ? 0 : -d_lse[i];
      for (int64_t l = 0; l < L; ++l) delta += double(d_o[i * L + l]) * double(o[i * L + l]);
      stats.delta[i] = T(delta);
    }
  });
  return stats;
}

template <class T>
void token_gradients(const Plan<T>& plan, const PackedTokens<T>& packed, const QueryStatistics<T>& stats, const T* d_o,
                     T* dfeat, T* dscale, const Parallel& parallel) {
  const GridAttentionInput<T>& in = plan.in;
  const int64_t N = in.queries, F = in.features, M = plan.tokens, L = plan.length;
  const Aligned<T> q(in.batch * N * L), grad(in.batch * N * L);
  std::vector<T> delta(in.batch * N);
  parallel.run(in.batch * N, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = plan.q(i / N) + i % N * L;
      const T weight = stats.weight[i], log2e = packed.all_masked[i / N] ? T(0) : T(kLog2e);
      for (int64_t l = 0; l < L; ++l) {
        q.get()[i * L + l] = row[l] * log2e;
        grad.get()[i * L + l] = d_o[i * L + l] * weight;
      }
      delta[i] = stats.delta[i] * weight;
    }
  });
  const int64_t parts = part_count(plan.rows, plan.columns, std::min<int64_t>(4 * parallel.threads, M / 512));
  parallel.run(in.batch * parts, [&](int64_t begin, int64_t end) {
    const Aligned<T> row_sums(2 * N), columns(3 * F * plan.kernels.lanes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts, n = b * N;
      plan.kernels.token_gradient(
          part_of(plan.box(packed, b), task % parts, parts),
          {N, L, q.get() + n * L, grad.get() + n * L, stats.shift.data() + n, delta.data() + n, in.feat + b * M * F,
           dfeat + b * M * F, dscale + b * M, row_sums.get(), columns.get()});
    }
  });
}

}  // namespace

template <class T>
void grid_attention_forward(const GridAttentionInput<T>& in, T* o, double* lse, const Parallel& parallel) {
  const Plan<T> plan(in);
  const PackedTokens<T> packed = pack_tokens(in, plan.tokens, parallel);
  const int64_t L = plan.length, lanes = plan.kernels.lanes;

  const auto work = [&](int64_t task, int64_t part, int64_t parts, T* sums) {
    const QueryTable<T> table(plan, packed, task);
    T* shift = sums + (L + 1) * lanes;
    bound_logits(table.q.get(), in.sizes, in.features, int(lanes), packed.bounds[table.b], shift);
    for (int64_t lane = 0; lane < lanes; ++lane) shift[lane] = shift_for<T>(shift[lane]);
    forward_part(plan, part_of(plan.box(packed, table.b), part, parts), table.q.get(), sums);
  };
  const auto finish = [&](int64_t task, T* sums) {
    const int64_t b = task / plan.blocks, first = task % plan.blocks * lanes;
    const int64_t count = std::min<int64_t>(lanes, in.queries - first);
    const T *total = sums + L * lanes, *shift = total + lanes;
    const T least = T(std::exp2(-kSafe<T>));
    if (std::any_of(total, total + count, [&](T sum) { return !(sum >= least); }))
      forward_exactly(plan, packed, task, sums);
    std::vector<T> inverse(lanes);
    for (int64_t lane = 0; lane < count; ++lane) {
      inverse[lane] = T(1) / total[lane];
      lse[b * in.queries + first + lane] =
          packed.all_masked[b] ? -double(std::numeric_limits<T>::max())
                               : (std::log2(double(total[lane])) - double(shift[lane])) / kLog2e;
    }
    unpack_table(sums, L, lanes, inverse.data(), count, o + (b * in.queries + first) * L, L);
  };
  for_each_block(plan, parallel, work, finish);
}

template <class T>
void grid_attention_backward(const GridAttentionInput<T>& in, const T* o, const double* lse, const T* d_o,
                             const double* d_lse, T* dq, T* dfeat, T* dscale, const Parallel& parallel) {
  const Plan<T> plan(in);
  const PackedTokens<T> packed = pack_tokens(in, plan.tokens, parallel);
  const int64_t N = in.queries, L = plan.length, lanes = plan.kernels.lanes;
  QueryStatistics<T> stats = query_statistics(plan, packed, o, lse, d_o, d_lse, parallel);

  // The weight of P rides on the output's gradient, so that the loop multiplies by it nowhere.
  const auto work = [&](int64_t task, int64_t part, int64_t parts, T* sums) {
    const QueryTable<T> table(plan, packed, task);
    const int64_t row = table.b * N + table.first;
    const Aligned<T> grad(L * lanes), scratch(2 * (in.features + 1) * lanes);
    std::vector<T> shift(lanes), delta(lanes);
    for (int64_t lane = 0; lane < table.count; ++lane) {
      shift[lane] = stats.shift[row + lane];
      delta[lane] = stats.delta[row + lane] * stats.weight[row + lane];
    }
    pack_table(d_o + row * L, L, table.count, L, lanes, stats.weight.data() + row, grad.get());
    std::fill(sums, sums + (L + 2) * lanes, T(0));
    plan.kernels.backward(part_of(plan.box(packed, table.b), part, parts),
                          {table.q.get(), shift.data(), grad.get(), delta.data(), sums, scratch.get()});
  };
  // dS sums to d_lse over the tokens. What it sums to in floating point is the error of delta, which came from
  // rounded outputs; with P summing to one that error put err * o into dq. Taking it out leaves an error of second
  // order, so that saturated queries get their tiny gradients and not the noise of delta.
  const auto finish = [&](int64_t task, T* sums) {
    const int64_t b = task / plan.blocks, first = task % plan.blocks * lanes;
    const int64_t count = std::min<int64_t>(lanes, N - first);
    const std::vector<T> factor(lanes, T(1));
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t row = b * N + first + lane;
      const T wanted = d_lse == nullptr || packed.all_masked[b] ? T(0) : T(d_lse[row]);
      const T error = sums[L * lanes + lane] - wanted;
      stats.delta[row] += error;
      for (int64_t l = 0; l < L; ++l) {
        T& sum = sums[l * lanes + lane];
        sum = packed.constant[b] ? wanted * o[row * L + l] : sum - error * o[row * L + l];
      }
    }
    unpack_table(sums, L, lanes, factor.data(), count, dq + (b * N + first) * L, L);
  };
  for_each_block(plan, parallel, work, finish);
  if (dfeat != nullptr) token_gradients(plan, packed, stats, d_o, dfeat, dscale, parallel);
}

#define PF_INSTANTIATE(T)                                                                                        \
  template void grid_attention_forward<T>(const GridAttentionInput<T>&, T*, double*, const Parallel&);           \
  template void grid_attention_backward<T>(const GridAttentionInput<T>&, const T*, const double*, const T*,      \
                                           const double*, T*, T*, T*, const Parallel&);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace perceiver_fast
