// Backward of streaming attention: dq, dk and dv in one pass over tiles and blocks, from weights that are recomputed.
//
//   dS = P (v d_o - delta), delta = o d_o - d_lse      dq = scale dS k      dk = scale dS^T q      dv = P^T d_o
//
// Heads go to the threads; where their number divides evenly, a head is begun and finished by one of them, and its sums stay
// in cache. Else each is cut along the longer of its two sides, tokens or queries (inverted: always tokens), so that the
// gradients of that side have one writer each. The other side's gradients are then partial sums, one copy a part, which are
// added up in order at the end.
//
// Memory: five numbers a query; for a thread the packed queries and gradients of one group of blocks, at most half a
// second-level cache, with a tile's P and dS; and a head's sums for a thread, or where heads are cut, the copies of all.
#include <numeric>

#include "cross_attention.h"
#include "cross_attention_inverted.h"
#include "cross_attention_tiles.h"
#include "cross_attention_widened.h"
#include "few_attention.h"

namespace perceiver_fast {

namespace {

template <class X>
class Backward {
  using T = ComputeOf<X>;
  static constexpr bool kPairs = BackwardTiles<X>::kPairs;

 public:
  Backward(const BackwardTiles<X>& tiles, const HeadMatrix<X>& dq, const HeadMatrix<X>& dk, const HeadMatrix<X>& dv,
           const Parallel& parallel)
      : tiles_(tiles),
        in_(tiles.in),
        heads_(tiles.blocking.heads()),
        blocks_(tiles.blocking.blocks),
        dq_size_(blocks_ * tiles.dq_block()),
        dq_(dq),
        dk_(dk),
        dv_(dv),
        parallel_(parallel) {}

  void run() {
    if (heads_ == 0) return;
    if (heads_ % parallel_.threads == 0)
      whole_heads();
    else
      cut_heads();
  }

 private:
  // Sums of dk, dv: where they belong when rows need no padding, have one writer and are not rounded.
  bool joined(int64_t padded, int64_t channels, int64_t copies) const {
    return dk_.data != nullptr && (kPairs || copies > 1 || padded != channels);
  }

  // Where a head's gradients of keys or values are added up: in memory of ours, or, of floats, where they belong.
  T* rows_of(const HeadMatrix<X>& to, bool joined, T* sums, int64_t head) const {
    if constexpr (!kPairs)
      if (!joined && to.data) return to.at(head / in_.heads, head % in_.heads, 0);
    return joined ? sums : nullptr;
  }

  void whole_heads() {
    const PackedBlock<X>& packed = tiles_.packed;
    const bool k_joined = joined(packed.pad_d, packed.d, 1), v_joined = joined(packed.pad_v, packed.v, 1);
    parallel_.run(heads_, [&](int64_t begin, int64_t end) {
      const Aligned<T> dq_sums(dq_size_);
      const Aligned<T> dk_sums(k_joined ? in_.tokens * packed.pad_d : 0), dv_sums(v_joined ? in_.tokens * packed.pad_v : 0);
      for (int64_t head = begin; head < end; ++head) {
        if (!in_.inverted) tiles_.queries.fill(head * in_.queries, (head + 1) * in_.queries);
        const HeadSums<T> sums{dq_sums.get(), rows_of(dk_, k_joined, dk_sums.get(), head),
                               rows_of(dv_, v_joined, dv_sums.get(), head),
                               k_joined ? packed.pad_d : dk_.row_stride, v_joined ? packed.pad_v : dv_.row_stride};
        std::fill_n(sums.dq, dq_size_, T(0));
        clear_tokens(sums, 0, in_.tokens);
        std::vector<int64_t> blocks(blocks_);
        std::iota(blocks.begin(), blocks.end(), 0);
        tiles_.run(head, blocks, 0, tiles_.blocking.tiles, false, sums);
        if (!in_.inverted) blocks = with_errors(head, sums.dq);
        if (!in_.inverted && !blocks.empty()) tiles_.run(head, blocks, 0, tiles_.blocking.tiles, true, sums);
        put_queries(head, 0, blocks_, sums.dq);
        if (k_joined) put_tokens(dk_, head, 0, in_.tokens, in_.dim, sums.dk, packed.pad_d, key_factor());
        if (v_joined) put_tokens(dv_, head, 0, in_.tokens, in_.dim_v, sums.dv, packed.pad_v, T(1));
      }
    });
  }

  void cut_heads() {
    const PackedBlock<X>& packed = tiles_.packed;
    const int64_t M = in_.tokens, tiles = tiles_.blocking.tiles;
    const bool by_tokens = in_.inverted || M >= in_.queries;
    const int64_t parts = std::min(by_tokens ? tiles : blocks_, ceil_div(2 * parallel_.threads, heads_));
    const int64_t dq_copies = by_tokens ? parts : 1, token_copies = by_tokens ? 1 : parts;
    const bool k_joined = joined(packed.pad_d, packed.d, token_copies);
    const bool v_joined = joined(packed.pad_v, packed.v, token_copies);
    const int64_t dk_size = k_joined ? M * packed.pad_d : 0, dv_size = v_joined ? M * packed.pad_v : 0;
    const Aligned<T> dq_sums(heads_ * dq_copies * dq_size_);
    const Aligned<T> dk_sums(heads_ * token_copies * dk_size), dv_sums(heads_ * token_copies * dv_size);
    if (!in_.inverted)
      parallel_.run(tiles_.queries.count(), [&](int64_t begin, int64_t end) { tiles_.queries.fill(begin, end); });

    std::vector<std::vector<int64_t>> flagged(heads_, std::vector<int64_t>(blocks_));  // blocks to work on
    for (auto& blocks : flagged) std::iota(blocks.begin(), blocks.end(), 0);
    // One part of a head: all of its blocks to work on and some tiles, or some of the blocks and all tiles.
    const auto each_part = [&](bool correction) {
      parallel_.run(heads_ * parts, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t head = task / parts, part = task % parts;
          const auto first = [&](int64_t n, int64_t i) { return n * i / parts; };
          const int64_t tile = by_tokens ? first(tiles, part) : 0, last = by_tokens ? first(tiles, part + 1) : tiles;
          const int64_t block = by_tokens ? 0 : first(blocks_, part);
          const int64_t block_end = by_tokens ? blocks_ : first(blocks_, part + 1);
          std::vector<int64_t> blocks;
          for (int64_t i : flagged[head])
            if (i >= block && i < block_end) blocks.push_back(i);
          const int64_t q_copy = by_tokens ? task : head, token_copy = by_tokens ? head : task;
          const HeadSums<T> sums{dq_sums.get() + q_copy * dq_size_,
                                 rows_of(dk_, k_joined, dk_sums.get() + token_copy * dk_size, head),
                                 rows_of(dv_, v_joined, dv_sums.get() + token_copy * dv_size, head),
                                 k_joined ? packed.pad_d : dk_.row_stride, v_joined ? packed.pad_v : dv_.row_stride};
          // A correction is added to the results of the first pass. By then the first copy of dq is the sum of all copies,
          // so the others start at zero again; and those of keys and values still are to be added up.
          if (!correction) {
            std::fill_n(sums.dq + block * tiles_.dq_block(), (block_end - block) * tiles_.dq_block(), T(0));
            clear_tokens(sums, tile * kTileTokens, std::min(last * kTileTokens, M));
          } else if (by_tokens && part > 0) {
            std::fill_n(sums.dq, dq_size_, T(0));
          }
          tiles_.run(head, blocks, tile, last, correction, sums);
        }
      });
      add_copies(dq_sums.get(), dq_copies, dq_size_);
    };
    each_part(false);
    if (!in_.inverted) {
      bool any = false;
      for (int64_t head = 0; head < heads_; ++head) {
        flagged[head] = with_errors(head, dq_sums.get() + head * dq_copies * dq_size_);
        any |= !flagged[head].empty();
      }
      if (any) each_part(true);
    }
    add_copies(dk_sums.get(), token_copies, dk_size);
    add_copies(dv_sums.get(), token_copies, dv_size);
    parallel_.run(heads_ * blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        put_queries(i / blocks_, i % blocks_, i % blocks_ + 1, dq_sums.get() + i / blocks_ * dq_copies * dq_size_);
    });
    if (!k_joined && !v_joined) return;
    parallel_.run(heads_ * M, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / M, m = i % M, copy = head * token_copies;
        if (k_joined)
          put_tokens(dk_, head, m, m + 1, in_.dim, dk_sums.get() + copy * dk_size, packed.pad_d, key_factor());
        if (v_joined) put_tokens(dv_, head, m, m + 1, in_.dim_v, dv_sums.get() + copy * dv_size, packed.pad_v, T(1));
      }
    });
  }

  // Queries are packed times the logits' scale, unless they are pairs.
  T key_factor() const { return kPairs ? T(in_.scale) : T(1); }

  void clear_tokens(const HeadSums<T>& sums, int64_t first, int64_t last) const {
    for (int64_t m = first; m < last && sums.dk; ++m) {
      std::fill_n(sums.dk + m * sums.dk_row, tiles_.packed.pad_d, T(0));
      std::fill_n(sums.dv + m * sums.dv_row, tiles_.packed.pad_v, T(0));
    }
  }

  // Over the tokens dS sums to d_lse. What it sums to beside that is the error of delta, which was computed from
  // rounded outputs. It does not matter beside dS of ordinary size; where softmax is saturated dS is tiny, and the
  // block gets a second pass that takes the error out. Returns these blocks of a head.
  std::vector<int64_t> with_errors(int64_t head, const T* dq_sums) const {
    const T tolerance = 16 * std::numeric_limits<T>::epsilon();
    const int64_t W = tiles_.blocking.width;
    std::vector<int64_t> found;
    if (tiles_.terms.uniform[head / in_.heads]) return found;  // there is no dS
    for (int64_t block = 0; block < blocks_; ++block) {
      const T* sum = dq_sums + block * tiles_.dq_block() + in_.dim * W;
      bool any = false;
      for (int64_t lane = 0; lane < tiles_.blocking.count_of(block); ++lane) {
        const int64_t row = head * in_.queries + block * W + lane;
        const T error = sum[lane] - tiles_.queries.d_lse(row);
        tiles_.queries.change[row] = error * tiles_.queries.weight[row];
        any |= std::abs(error) > tolerance * sum[W + lane];
      }
      if (any) found.push_back(block);
    }
    return found;
  }

  // Adds the copies of every head to its first.
  void add_copies(T* data, int64_t copies, int64_t size) const {
    if (copies == 1 || size == 0) return;
    constexpr int64_t kChunk = 4096;
    const int64_t chunks = ceil_div(size, kChunk);
    parallel_.run(heads_ * chunks, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        T* head = data + task / chunks * copies * size;
        const int64_t i0 = task % chunks * kChunk, i1 = std::min(i0 + kChunk, size);
        for (int64_t copy = 1; copy < copies; ++copy)
          for (int64_t i = i0; i < i1; ++i) head[i] += head[copy * size + i];
      }
    });
  }

  // The sums of a head's blocks [first, last), as rows.
  void put_queries(int64_t head, int64_t first, int64_t last, const T* sums) const {
    const int64_t W = tiles_.blocking.width;
    const std::vector<T> scale(W, T(in_.scale));
    const Aligned<T> scratch(W * in_.dim);
    for (int64_t block = first; block < last; ++block)
      block_to_rows(tiles_.blocking, sums + block * tiles_.dq_block(), in_.dim, scale.data(),
                    tiles_.blocking.count_of(block), scratch.get(),
                    dq_.at(head / in_.heads, head % in_.heads, block * W), dq_.row_stride);
  }

  // `factor` times the sums of a head's tokens [first, last), without what pads their rows.
  void put_tokens(const HeadMatrix<X>& to, int64_t head, int64_t first, int64_t last, int64_t channels, const T* sums,
                  int64_t padded, T factor) const {
    for (int64_t m = first; m < last; ++m)
      tiles_.blocking.kernels.scale(channels, factor, sums + m * padded, to.at(head / in_.heads, head % in_.heads, m));
  }

  const BackwardTiles<X>& tiles_;
  const CrossAttentionInput<X>& in_;
  const int64_t heads_, blocks_, dq_size_;
  const HeadMatrix<X>&dq_, &dk_, &dv_;
  const Parallel& parallel_;
};

template <class X, class T>
void stream_backward(const CrossAttentionInput<X>& in, const HeadMatrix<const T>& o, const double* lse,
                     const double* token_lse, const HeadMatrix<const X>& d_o, const double* d_lse,
                     const HeadMatrix<X>& dq, const HeadMatrix<X>& dk, const HeadMatrix<X>& dv,
                     const Parallel& parallel) {
  const CrossAttentionBlocking<X> blocking(in);
  TokenTerms<T> terms(in.batch, in.heads, in.tokens, in.mask, in.inverted ? token_lse : nullptr, in.dropout);
  QueryTerms<X> queries(blocking, terms, o, lse, d_o, d_lse);
  const BackwardTiles<X> tiles(blocking, terms, queries, d_o);
  if constexpr (!std::is_same_v<X, BFloat16>) {
    if (in.inverted) {
      parallel.run(queries.count(), [&](int64_t begin, int64_t end) { queries.fill(begin, end); });
      find_query_delta_low(tiles, parallel);
      for (int pass = 0; pass < 2; ++pass) find_token_delta(tiles, pass, parallel);
    }
  }
  Backward<X>(tiles, dq, dk, dv, parallel).run();
}

// Rows of o's shape, dense.
void copy_rows(const CrossAttentionInput<BFloat16>& in, const HeadMatrix<const BFloat16>& from, BFloat16* to,
               const Parallel& parallel) {
  for_rows(in.batch, in.heads, in.queries, parallel, [&](int64_t b, int64_t h, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      std::copy_n(from.at(b, h, row), in.dim_v, to + ((b * in.heads + h) * in.queries + row) * in.dim_v);
  });
}

void widened_backward(const CrossAttentionInput<BFloat16>& in, const HeadMatrix<const float>& o, const double* lse,
                      const double* token_lse, const HeadMatrix<const BFloat16>& d_o, const double* d_lse,
                      const HeadMatrix<BFloat16>& dq, const HeadMatrix<BFloat16>& dk, const HeadMatrix<BFloat16>& dv,
                      const Parallel& parallel) {
  const int64_t B = in.batch, H = in.heads, N = in.queries, M = in.tokens, d = in.dim, v = in.dim_v;
  const bool learn = dk.data != nullptr;
  const Widened wide(in, parallel);
  const WidenedRows grad(d_o, B, H, N, v, parallel);
  const Aligned<float> to_q(B * H * N * d), to_k(learn ? B * H * M * d : 0), to_v(learn ? B * H * M * v : 0);
  const HeadMatrix<float> none{};
  cross_attention_backward(wide.input(), o, lse, token_lse, grad.view(), d_lse, dense_heads(to_q.get(), H, N, d),
                           learn ? dense_heads(to_k.get(), H, M, d) : none,
                           learn ? dense_heads(to_v.get(), H, M, v) : none, parallel);
  narrow_rows(to_q.get(), B, H, N, d, dq, parallel);
  if (!learn) return;
  narrow_rows(to_k.get(), B, H, M, d, dk, parallel);
  narrow_rows(to_v.get(), B, H, M, v, dv, parallel);
}

}  // namespace

template <class X>
void cross_attention_backward(const CrossAttentionInput<X>& in, const HeadMatrix<const ComputeOf<X>>& o,
                              const double* lse, const double* token_lse, const HeadMatrix<const X>& d_o,
                              const double* d_lse, const HeadMatrix<X>& dq, const HeadMatrix<X>& dk,
                              const HeadMatrix<X>& dv, const Parallel& parallel) {
  if constexpr (std::is_same_v<X, BFloat16>) {
    if (!takes_pairs(in)) return widened_backward(in, o, lse, token_lse, d_o, d_lse, dq, dk, dv, parallel);
    if (d_o.row_stride & 1) {  // rows that are not read as pairs of channels, as those of q, k and v can be
      const Aligned<BFloat16> rows(in.batch * in.heads * in.queries * in.dim_v);
      copy_rows(in, d_o, rows.get(), parallel);
      return stream_backward(in, o, lse, token_lse, dense_outputs<const BFloat16>(in, rows.get()), d_lse, dq, dk, dv,
                             parallel);
    }
  } else {
    if (FewAttention<X>::takes(in)) return FewAttention<X>(in).backward(d_o, d_lse, dq, dk, dv, parallel);
  }
  stream_backward(in, o, lse, token_lse, d_o, d_lse, dq, dk, dv, parallel);
}

#define PF_INSTANTIATE(X)                                                                                          \
  template void cross_attention_backward<X>(const CrossAttentionInput<X>&, const HeadMatrix<const ComputeOf<X>>&,  \
                                            const double*, const double*, const HeadMatrix<const X>&, const double*, \
                                            const HeadMatrix<X>&, const HeadMatrix<X>&, const HeadMatrix<X>&,      \
                                            const Parallel&);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)
PF_INSTANTIATE(BFloat16)
#undef PF_INSTANTIATE

}  // namespace perceiver_fast
