// What the backward of streaming attention does with the blocks of one head and some of its tiles, once it is known where
// their sums go (cross_attention_backward.cpp).
#pragma once

#include "cross_attention_blocking.h"

namespace perceiver_fast {

// P = 2^(S log2(e) + shift) * weight and dS = P (u - delta). No loop of floats multiplies by the weight: the output's gradient
// and delta are multiplied by it beforehand. `delta_low` is the rounding error of delta, for inverted attention. `change`
// is by how much delta turned out to be off, times the weight.
template <class X>
class QueryTerms {
  using T = ComputeOf<X>;

 public:
  std::vector<T> shift, weight, delta, delta_low, change;

  // d_lse may be null. Nothing is filled in yet.
  QueryTerms(const CrossAttentionBlocking<X>& blocking, const TokenTerms<T>& terms, const HeadMatrix<const T>& o,
             const double* lse, const HeadMatrix<const X>& d_o, const double* d_lse)
      : shift(blocking.heads() * blocking.in.queries),
        weight(shift.size()),
        delta(shift.size()),
        delta_low(shift.size()),
        change(shift.size()),
        blocking_(blocking),
        terms_(terms),
        o_(o),
        lse_(lse),
        d_o_(d_o),
        d_lse_(d_lse) {}

  int64_t count() const { return int64_t(shift.size()); }
  T d_lse(int64_t row) const { return d_lse_ == nullptr ? T(0) : T(d_lse_[row]); }
  bool clamped(int64_t row) const { return is_clamped(lse_[row]); }

  // Fills in the terms of some queries, counted over batch and heads.
  void fill(int64_t begin, int64_t end) {
    const CrossAttentionInput<X>& in = blocking_.in;
    for (int64_t i = begin; i < end; ++i) {
      const bool uniform = terms_.uniform[i / (in.heads * in.queries)];
      const bool constant = in.inverted && clamped(i);  // a clamped normaliser is a constant
      const double lse2 = uniform    ? std::log2(double(in.tokens))
                          : constant ? std::log2(kInvertedEps)
                                     : lse_[i] * kLog2OfE;
      shift[i] = in.inverted ? T(0) : T(-std::nearbyint(lse2));
      weight[i] = T(std::exp2(-lse2 - double(shift[i])));
      const int64_t b = i / in.queries / in.heads, h = i / in.queries % in.heads, n = i % in.queries;
      double sum = constant ? 0 : blocking_.kernels.dot(in.dim_v, d_o_.at(b, h, n), o_.at(b, h, n));
      if (d_lse_ != nullptr) sum -= constant ? d_lse_[i] * clamped_share(lse_[i]) : d_lse_[i];
      delta[i] = T(sum) * weight[i];
    }
  }

 private:
  const CrossAttentionBlocking<X>& blocking_;
  const TokenTerms<T>& terms_;
  const HeadMatrix<const T>& o_;
  const double* lse_;
  const HeadMatrix<const X>& d_o_;
  const double* d_lse_;
};

// A block's packed queries and gradients, all in one piece of memory.
template <class X>
struct PackedBlock {
  using T = ComputeOf<X>;
  using Op = OperandOf<X>;
  static_assert(sizeof(Op) == sizeof(T), "they share memory");
  int64_t d, v, pad_d, pad_v, width;

  explicit PackedBlock(const CrossAttentionBlocking<X>& blocking)
      : d(blocking.in.dim),
        v(blocking.in.dim_v),
        pad_d(blocking.padded(d)),
        pad_v(blocking.padded(v)),
        width(blocking.width) {}
  int64_t rows() const { return operands<X>(width); }
  int64_t size() const { return (operands<X>(d) + operands<X>(v) + 5) * width + rows() * (pad_d + pad_v); }
  Op* q(T* at) const { return reinterpret_cast<Op*>(at); }
  Op* grad(T* at) const { return q(at) + operands<X>(d) * width; }
  Op* q_rows(T* at) const { return grad(at) + operands<X>(v) * width; }
  Op* grad_rows(T* at) const { return q_rows(at) + rows() * pad_d; }
  T* shift(T* at) const { return reinterpret_cast<T*>(grad_rows(at) + rows() * pad_v); }
  T* delta(T* at) const { return shift(at) + width; }
  T* delta_low(T* at) const { return delta(at) + width; }
  T* change(T* at) const { return delta_low(at) + width; }
  T* weight(T* at) const { return change(at) + width; }
};

// Where the blocks of a head add their gradients up: those of queries block by block, those of keys and values row by
// row, of all tokens of the head; null both where nobody needs them.
template <class T>
struct HeadSums {
  T *dq, *dk, *dv;
  int64_t dk_row, dv_row;
};

template <class X>
class BackwardTiles {
  using T = ComputeOf<X>;
  using Hash = typename HashLane<T>::type;

 public:
  static constexpr bool kPairs = Operand<X>::numbers == 2;
  const CrossAttentionBlocking<X>& blocking;
  const CrossAttentionInput<X>& in;
  TokenTerms<T>& terms;
  QueryTerms<X>& queries;
  const PackedBlock<X> packed;

  BackwardTiles(const CrossAttentionBlocking<X>& blocking_, TokenTerms<T>& terms_, QueryTerms<X>& queries_,
                const HeadMatrix<const X>& d_o)
      : blocking(blocking_),
        in(blocking_.in),
        terms(terms_),
        queries(queries_),
        packed(blocking_),
        d_o_(d_o),
        group_(blocking_.group_size(packed.size() + packed.d * blocking_.width)) {}

  int64_t dq_block() const { return (packed.d + 2) * packed.width; }  // [dim] rows of dq, sums of dS, sums of |dS|

  // A block as the kernels read it: `at` has packed.size() numbers, `hashes` one a query.
  void pack(int64_t head, int64_t block, T* at, Hash* hashes) const {
    const int64_t W = blocking.width, row = head * in.queries + block * W, count = blocking.count_of(block);
    const X* q = in.q.at(head / in.heads, head % in.heads, block * W);
    const X* d_o = d_o_.at(head / in.heads, head % in.heads, block * W);
    pack_queries(blocking, head, block, packed.q(at));
    for (int64_t lane = 0; lane < W; ++lane)
      packed.weight(at)[lane] = lane < count ? queries.weight[row + lane] * T(in.dropout.scale()) : T(0);
    const T* weight = packed.weight(at);
    rows_to_block(blocking, d_o, d_o_.row_stride, count, in.dim_v, weight, packed.grad(at));
    OperandOf<X>*q_rows = packed.q_rows(at), *grad_rows = packed.grad_rows(at);
    std::fill(q_rows, grad_rows + packed.rows() * packed.pad_v, OperandOf<X>{});
    if constexpr (kPairs) {
      blocking.kernels.pair_rows(count, in.dim, q, in.q.row_stride, packed.pad_d, q_rows);
      blocking.kernels.pair_rows(count, in.dim_v, d_o, d_o_.row_stride, packed.pad_v, grad_rows);
    } else {
      for (int64_t lane = 0; lane < count; ++lane, q += in.q.row_stride, d_o += d_o_.row_stride) {
        for (int64_t c = 0; c < in.dim; ++c) q_rows[lane * packed.pad_d + c] = T(in.scale) * q[c];
        for (int64_t c = 0; c < in.dim_v; ++c) grad_rows[lane * packed.pad_v + c] = weight[lane] * d_o[c];
      }
    }
    for (int64_t lane = 0; lane < W; ++lane) {
      // A lane without a query: its weights become zero.
      packed.shift(at)[lane] = lane < count ? queries.shift[row + lane] : -std::numeric_limits<T>::infinity();
      packed.delta(at)[lane] = lane < count ? queries.delta[row + lane] : T(0);
      packed.delta_low(at)[lane] = lane < count ? queries.delta_low[row + lane] : T(0);
      packed.change(at)[lane] = lane < count ? queries.change[row + lane] : T(0);
    }
    if (in.dropout) pack_hashes(blocking, head, block, hashes);
  }

  // A packed block as the kernels see it, without a place for its gradients.
  BackwardBlock<X> view(T* at, const Hash* hashes, T* p, T* ds) const {
    BackwardBlock<X> block{};
    block.q = packed.q(at);
    block.shift = packed.shift(at);
    block.grad = packed.grad(at);
    block.delta = packed.delta(at);
    block.delta_low = packed.delta_low(at);
    block.weight = packed.weight(at);
    block.q_rows = packed.q_rows(at);
    block.grad_rows = packed.grad_rows(at);
    block.pad_d = packed.pad_d;
    block.pad_v = packed.pad_v;
    block.hashes = hashes;
    block.p = p;
    block.ds = ds;
    return block;
  }

  // Adds what some blocks of a head and its tiles [tile, end) contribute to the sums; or, as a correction, only what follows
  // from the change of delta.
  void run(int64_t head, const std::vector<int64_t>& blocks, int64_t tile, int64_t end, bool correction,
           const HeadSums<T>& sums) const {
    const int64_t W = packed.width, size = packed.size();
    const Aligned<T> memory(group_ * size), p(kTileTokens * W), ds(kTileTokens * W);
    const Aligned<OperandOf<X>> rows(kPairs ? kTileTokens * packed.rows() : 0);
    const TilePairs<X> pairs(blocking, true);
    std::vector<Hash> hashes(group_ * W);
    for (size_t first = 0; first < blocks.size(); first += group_) {
      const int64_t count = std::min<int64_t>(group_, int64_t(blocks.size() - first));
      for (int64_t i = 0; i < count; ++i) pack(head, blocks[first + i], memory.get() + i * size, hashes.data() + i * W);
      for (int64_t t = tile; t < end; ++t) {
        TokenTile<X> tokens = tile_of(blocking, terms, head, t);
        pairs.set(tokens);
        for (int64_t i = 0; i < count; ++i) {
          T* at = memory.get() + i * size;
          BackwardBlock<X> block = view(at, hashes.data() + i * W, p.get(), ds.get());
          block.rows = rows.get();
          block.dq = sums.dq + blocks[first + i] * dq_block();
          block.sum = block.dq + packed.d * W;
          block.size = block.sum + W;
          block.dk = sums.dk ? sums.dk + t * kTileTokens * sums.dk_row : nullptr;
          block.dv = sums.dv ? sums.dv + t * kTileTokens * sums.dv_row : nullptr;
          block.dk_row = sums.dk_row;
          block.dv_row = sums.dv_row;
          if (correction)
            blocking.kernels.correct(tokens, block, packed.change(at));
          else
            blocking.kernels.backward(tokens, block);
        }
      }
    }
  }

 private:
  const HeadMatrix<const X>& d_o_;
  const int64_t group_;
};

}  // namespace perceiver_fast
