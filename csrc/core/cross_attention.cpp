// Forward of streaming attention: o = softmax(scale q k^T) v and its log-sum-exp, without a matrix of N x M.
//
// A head's queries are cut into blocks (two vectors wide, one query a lane) and its tokens into tiles of kTileTokens. A
// task is a group of blocks of one head: it walks the tiles in order and adds p v and p to sums of its own, with
// p = 2^(S + shift). Where there are too few tasks for the threads, the tokens are cut into parts too, and the sums of
// the parts are added up in order. How the work is cut depends on shapes and on the number of threads alone, so that
// the same run gives the same bits.
//
// Inverted attention sums exp(S) over the queries first, for every token, head by head and tile by tile.
//
// Memory: a thread has the sums and the packed queries of one group, at most half a second-level cache, and a tile's
// logits. Parts need their sums at once. Masks, dropout and inverted attention need a few numbers a token.
#include "cross_attention.h"

#include "cross_attention_blocking.h"
#include "cross_attention_widened.h"
#include "few_attention.h"

namespace perceiver_fast {

namespace {

// Sums of a group of query blocks over some of the tokens. A block has [dim_v] rows of sums, then its total, its shift.
template <class T>
struct ForwardState {
  int64_t width, rows;

  template <class X>
  explicit ForwardState(const CrossAttentionBlocking<X>& blocking) : width(blocking.width), rows(blocking.in.dim_v + 2) {}
  int64_t block_size() const { return rows * width; }
  T* out(T* state, int64_t i) const { return state + i * block_size(); }
  T* total(T* state, int64_t i) const { return out(state, i) + (rows - 2) * width; }
  T* shift(T* state, int64_t i) const { return out(state, i) + (rows - 1) * width; }
};

// Blocks [first, last) of one head over tiles [tile, end).
template <class X, class T = ComputeOf<X>>
void run_group(const CrossAttentionBlocking<X>& blocking, const TokenTerms<T>& terms, int64_t head, int64_t first,
               int64_t last, int64_t tile, int64_t end, T* state) {
  const ForwardState<T> at(blocking);
  const int64_t width = blocking.width, q_size = operands<X>(blocking.in.dim) * width, count = last - first;
  const Aligned<OperandOf<X>> q(count * q_size);
  const Aligned<T> scratch(kTileTokens * width);
  const TilePairs<X> pairs(blocking, false);
  std::vector<typename HashLane<T>::type> hashes(blocking.in.dropout ? count * width : 0);
  for (int64_t i = 0; i < count; ++i) {
    pack_queries(blocking, head, first + i, q.get() + i * q_size);
    if (blocking.in.dropout) pack_hashes(blocking, head, first + i, hashes.data() + i * width);
  }
  std::fill(state, state + count * at.block_size(), T(0));
  for (; tile < end; ++tile) {
    TokenTile<X> tokens = tile_of(blocking, terms, head, tile);
    pairs.set(tokens);
    for (int64_t i = 0; i < count; ++i)
      blocking.kernels.forward(tokens,
                               {q.get() + i * q_size, at.shift(state, i), at.total(state, i), at.out(state, i),
                                hashes.data() + (hashes.empty() ? 0 : i * width), scratch.get()},
                               blocking.in.inverted);
  }
}

// Adds the sums of another part of the tokens, whose shifts may differ.
template <class T>
void add_state(const ForwardState<T>& at, T* state, T* other, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    T *shift = at.shift(state, i), *other_shift = at.shift(other, i);
    T *total = at.total(state, i), *other_total = at.total(other, i);
    for (int64_t lane = 0; lane < at.width; ++lane) {
      // A part that summed nothing is left out. Of two shifts the smaller one belongs to the larger logits.
      const bool take = total[lane] == 0 || (other_total[lane] != 0 && other_shift[lane] < shift[lane]);
      const T common = take ? other_shift[lane] : shift[lane];
      const T mine = total[lane] == 0 ? T(1) : T(std::exp2(double(common - shift[lane])));
      const T theirs = other_total[lane] == 0 ? T(1) : T(std::exp2(double(common - other_shift[lane])));
      for (int64_t row = 0; row + 1 < at.rows; ++row) {
        T& sum = at.out(state, i)[row * at.width + lane];
        sum = sum * mine + at.out(other, i)[row * at.width + lane] * theirs;
      }
      shift[lane] = common;
    }
  }
}

template <class X, class T = ComputeOf<X>>
void finish_group(const CrossAttentionBlocking<X>& blocking, const TokenTerms<T>& terms, int64_t head, int64_t first,
                  int64_t last, T* state, const HeadMatrix<T>& o, double* lse) {
  const ForwardState<T> at(blocking);
  const CrossAttentionInput<X>& in = blocking.in;
  std::vector<T> factor(blocking.width);
  const Aligned<T> scratch(blocking.width * in.dim_v);
  for (int64_t block = first; block < last; ++block) {
    const int64_t i = block - first, row = head * in.queries + block * blocking.width, count = blocking.count_of(block);
    for (int64_t lane = 0; lane < count; ++lane) {
      const double total = at.total(state, i)[lane];
      factor[lane] = T(in.dropout.scale() / (in.inverted ? std::max(total, kInvertedEps) : total));
      if (in.inverted)
        lse[row + lane] = inverted_lse<T>(total);
      else
        lse[row + lane] = terms.uniform[head / in.heads]
                              ? kEmptyLse
                              : std::log(total) - double(at.shift(state, i)[lane]) / kLog2OfE;
    }
    block_to_rows(blocking, at.out(state, i), in.dim_v, factor.data(), count, scratch.get(),
                  o.at(head / in.heads, head % in.heads, block * blocking.width), o.row_stride);
  }
}

// Logarithm of the softmax's denominator of every token over the queries.
template <class T>
void token_statistics(const CrossAttentionBlocking<T>& blocking, double* token_lse, const Parallel& parallel) {
  const CrossAttentionInput<T>& in = blocking.in;
  const TokenTerms<T> none(in.batch, in.heads, in.tokens, nullptr, nullptr, Dropout(0, 0));
  const int64_t width = blocking.width, q_size = in.dim * width;
  parallel.run(blocking.heads() * blocking.tiles, [&](int64_t begin, int64_t end) {
    const Aligned<T> q(blocking.blocks * q_size), scratch(kTileTokens * width);
    const Aligned<T> maximum(kTileTokens * width), sum(kTileTokens * width), bias(width);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / blocking.tiles;
      if (head != packed)
        for (int64_t block = 0; block < blocking.blocks; ++block)
          pack_queries(blocking, head, block, q.get() + block * q_size);
      packed = head;
      std::fill_n(maximum.get(), kTileTokens * width, -std::numeric_limits<T>::max());
      std::fill_n(sum.get(), kTileTokens * width, T(0));
      TokenTile<T> tile = tile_of(blocking, none, head, task % blocking.tiles);
      tile.threshold = 0;  // the denominator is of all weights
      for (int64_t block = 0; block < blocking.blocks; ++block) {
        for (int64_t lane = 0; lane < width; ++lane)
          bias.get()[lane] = lane < blocking.count_of(block) ? T(0) : -std::numeric_limits<T>::infinity();
        blocking.kernels.token_sums(tile, q.get() + block * q_size, bias.get(), maximum.get(), sum.get(),
                                    scratch.get());
      }
      double* out = token_lse + head * in.tokens + task % blocking.tiles * kTileTokens;
      for (int64_t m = 0; m < tile.count; ++m) {
        const T *top = maximum.get() + m * width, *part = sum.get() + m * width;
        const T most = *std::max_element(top, top + width);
        double total = 0;
        for (int64_t lane = 0; lane < width; ++lane)
          if (part[lane] != 0) total += part[lane] * std::exp2(top[lane] - most);
        out[m] = (std::log2(total) + double(most)) / kLog2OfE;
      }
    }
  });
}

template <class X, class T>
void stream_forward(const CrossAttentionInput<X>& in, const HeadMatrix<T>& o, double* lse, const double* token_lse,
                    const Parallel& parallel) {
  const CrossAttentionBlocking<X> blocking(in);
  const TokenTerms<T> terms(in.batch, in.heads, in.tokens, in.mask, in.inverted ? token_lse : nullptr, in.dropout);
  const ForwardState<T> at(blocking);
  int64_t group = blocking.group_size((in.dim + in.dim_v + 2) * blocking.width),
          groups = ceil_div(blocking.blocks, group), tasks = blocking.heads() * groups, parts = 1;
  if (tasks == 0) return;
  // Few tasks: split the tokens too, or where these are few, the queries. Depends on shape and thread count alone: the
  // same run gives the same bits.
  if (tasks % parallel.threads != 0 && tasks < 8 * parallel.threads) {
    parts = std::max<int64_t>(1, std::min(ceil_div(4 * parallel.threads, tasks), blocking.tiles / 4));
    if (parts == 1) {
      group = ceil_div(blocking.blocks, std::min(blocking.blocks, ceil_div(4 * parallel.threads, blocking.heads())));
      groups = ceil_div(blocking.blocks, group);
      tasks = blocking.heads() * groups;
    }
  }
  const int64_t size = group * at.block_size();
  const auto first = [&](int64_t task) { return task % groups * group; };
  const auto last = [&](int64_t task) { return std::min(first(task) + group, blocking.blocks); };
  if (parts == 1) {
    parallel.run(tasks, [&](int64_t begin, int64_t end) {
      const Aligned<T> state(size);
      for (int64_t task = begin; task < end; ++task) {
        run_group(blocking, terms, task / groups, first(task), last(task), 0, blocking.tiles, state.get());
        finish_group(blocking, terms, task / groups, first(task), last(task), state.get(), o, lse);
      }
    });
    return;
  }
  const Aligned<T> states(tasks * parts * size);
  parallel.run(tasks * parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = i / parts, part = i % parts;
      run_group(blocking, terms, task / groups, first(task), last(task), blocking.tiles * part / parts,
                blocking.tiles * (part + 1) / parts, states.get() + i * size);
    }
  });
  parallel.run(tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      T* state = states.get() + task * parts * size;
      for (int64_t part = 1; part < parts; ++part)
        add_state(at, state, state + part * size, last(task) - first(task));
      finish_group(blocking, terms, task / groups, first(task), last(task), state, o, lse);
    }
  });
}

}  // namespace

template <class X>
void cross_attention_forward(const CrossAttentionInput<X>& in, const HeadMatrix<ComputeOf<X>>& o, double* lse,
                             double* token_lse, const Parallel& parallel) {
  if constexpr (std::is_same_v<X, BFloat16>) {
    if (takes_pairs(in)) return stream_forward(in, o, lse, nullptr, parallel);
    return cross_attention_forward(Widened(in, parallel).input(), o, lse, token_lse, parallel);
  } else {
    if (FewAttention<X>::takes(in)) return FewAttention<X>(in).forward(o, lse, parallel);
    if (in.inverted) token_statistics(CrossAttentionBlocking<X>(in), token_lse, parallel);
    stream_forward(in, o, lse, token_lse, parallel);
  }
}

#define PF_INSTANTIATE(X)                                                                                         \
  template void cross_attention_forward<X>(const CrossAttentionInput<X>&, const HeadMatrix<ComputeOf<X>>&, double*, \
                                           double*, const Parallel&);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)
PF_INSTANTIATE(BFloat16)
#undef PF_INSTANTIATE

}  // namespace perceiver_fast
