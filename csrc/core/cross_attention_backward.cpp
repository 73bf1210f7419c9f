// Backward of streaming attention: dq, dk and dv in one pass over tiles and blocks, from weights that are recomputed.
//
//   dS = P (v d_o - delta), delta = o d_o - d_lse      dq = scale dS k      dk = scale dS^T q      dv = P^T d_o
//
// Heads go to the threads. Unless their number divides evenly, each is cut along the longer of its two sides, tokens or
// queries (inverted: always tokens), so that the gradients of that side have one writer each. The other side's
// gradients are then partial sums, one copy a part, which are added up in order at the end.
//
// Memory: three numbers a query, the copies just named (one of dq, dk and dv where heads are not cut), and for a thread
// the packed queries and gradients of one group of blocks, at most half a second-level cache, with a tile's P and dS.
#include "cross_attention.h"
#include "cross_attention_blocking.h"
#include "cross_attention_widened.h"
#include "few_attention.h"

namespace perceiver_fast {

namespace {

// In double; four sums need not wait for one another.
template <class X>
double dot(const X* a, const ComputeOf<X>* b, int64_t count) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int chain = 0; chain < 4; ++chain) sums[chain] += double(widened(a[i + chain])) * double(b[i + chain]);
  for (; i < count; ++i) sums[0] += double(widened(a[i])) * double(b[i]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// P = 2^(S log2(e) + shift) * weight and dS = P (u - delta). No loop multiplies by the weight: the output's gradient
// and delta are multiplied by it beforehand. `delta_low` is the rounding error of delta, for inverted attention.
template <class T>
struct QueryTerms {
  std::vector<T> shift, weight, delta, delta_low;

  template <class X>
  QueryTerms(const CrossAttentionInput<X>& in, const TokenTerms<T>& terms, const T* o, const double* lse, const X* d_o,
             const double* d_lse, const Parallel& parallel)
      : shift(in.batch * in.heads * in.queries), weight(shift.size()), delta(shift.size()), delta_low(shift.size()) {
    parallel.run(int64_t(shift.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const bool uniform = terms.uniform[i / (in.heads * in.queries)];
        const bool constant = in.inverted && is_clamped(lse[i]);  // a clamped normaliser is a constant
        const double lse2 = uniform    ? std::log2(double(in.tokens))
                            : constant ? std::log2(kInvertedEps)
                                       : lse[i] * kLog2OfE;
        shift[i] = in.inverted ? T(0) : T(-std::nearbyint(lse2));
        weight[i] = T(std::exp2(-lse2 - double(shift[i])));
        double sum = 0;
        if (!constant) sum = dot(d_o + i * in.dim_v, o + i * in.dim_v, in.dim_v);
        if (d_lse != nullptr) sum -= constant ? d_lse[i] * clamped_share(lse[i]) : d_lse[i];
        delta[i] = T(sum) * weight[i];
      }
    });
  }
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

template <class X>
class Backward {
  using T = ComputeOf<X>;
  using Hash = typename HashLane<T>::type;
  static constexpr bool kPairs = Operand<X>::numbers == 2;

 public:
  Backward(const CrossAttentionBlocking<X>& blocking, TokenTerms<T>& terms, QueryTerms<T>& queries, const X* d_o,
           const Parallel& parallel)
      : blocking_(blocking),
        in_(blocking.in),
        terms_(terms),
        queries_(queries),
        d_o_(d_o),
        parallel_(parallel),
        packed_(blocking),
        group_(blocking.group_size(packed_.size() + packed_.d * blocking.width)) {}

  // Inverted attention: what delta lacks, the sum of P (u - delta) over a query's tokens less d_lse. Where one token is all that a
  // query has, the difference is nothing but rounding otherwise, and a query that hardly owns its tokens multiplies it
  // by up to 1 / kInvertedEps. Before the tokens' deltas are known, which are zero here.
  void find_query_delta_low(const double* lse, const double* d_lse) {
    const int64_t W = blocking_.width;
    parallel_.run(blocking_.heads() * blocking_.blocks, [&](int64_t begin, int64_t end) {
      const Aligned<T> memory(packed_.size()), p(kTileTokens * W), ds(kTileTokens * W), sums(kTileTokens * W);
      std::vector<Hash> hashes(W);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / blocking_.blocks, block = task % blocking_.blocks;
        pack(head, block, memory.get(), hashes.data());
        std::vector<T> error(W);
        for (int64_t tile = 0; tile < blocking_.tiles; ++tile) {
          const TokenTile<X> tokens = tile_of(blocking_, terms_, head, tile);
          std::fill_n(sums.get(), kTileTokens * W, T(0));
          blocking_.kernels.token_delta(tokens, view(memory.get(), hashes.data(), p.get(), ds.get()), sums.get());
          for (int64_t lane = 0; lane < W; ++lane) {
            T sum = 0;
            for (int64_t m = 0; m < tokens.count; ++m) sum += sums.get()[m * W + lane];
            error[lane] += sum;
          }
        }
        for (int64_t lane = 0; lane < blocking_.count_of(block); ++lane) {
          const int64_t row = head * in_.queries + block * W + lane;
          const T wanted = d_lse == nullptr ? T(0) : T(d_lse[row]);
          if (!is_clamped(lse[row])) queries_.delta_low[row] = (error[lane] - wanted) * queries_.weight[row];
        }
      }
    });
  }

  // Inverted attention: what the softmax over the queries needs of every token, sum_n P dP. The second pass finds the
  // rounding error of the first, so that a token that one query has all of gets its tiny gradients and not that error.
  void find_token_delta(int pass) {
    const int64_t W = blocking_.width;
    parallel_.run(blocking_.heads() * blocking_.tiles, [&](int64_t begin, int64_t end) {
      const int64_t size = packed_.size();
      const Aligned<T> memory(blocking_.blocks * size), p(kTileTokens * W), ds(kTileTokens * W), sums(kTileTokens * W);
      std::vector<Hash> hashes(blocking_.blocks * W);
      int64_t packed_head = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / blocking_.tiles, tile = task % blocking_.tiles;
        const TokenTile<X> tokens = tile_of(blocking_, terms_, head, tile);
        if (head != packed_head)
          for (int64_t i = 0; i < blocking_.blocks; ++i) pack(head, i, memory.get() + i * size, hashes.data() + i * W);
        packed_head = head;
        std::fill_n(sums.get(), kTileTokens * W, T(0));
        for (int64_t i = 0; i < blocking_.blocks; ++i)
          blocking_.kernels.token_delta(tokens, view(memory.get() + i * size, hashes.data() + i * W, p.get(), ds.get()),
                                        sums.get());
        T* delta = (pass == 0 ? terms_.delta : terms_.delta_low).data() + terms_.row(head) + tile * kTileTokens;
        for (int64_t m = 0; m < tokens.count; ++m) {
          T sum = 0;
          for (int64_t lane = 0; lane < W; ++lane) sum += sums.get()[m * W + lane];
          delta[m] = sum;
        }
      }
    });
  }

  void run(const double* d_lse, X* dq, const HeadMatrix<X>& dk, const HeadMatrix<X>& dv) {
    const int64_t heads = blocking_.heads(), W = blocking_.width, M = in_.tokens;
    if (heads == 0) return;
    by_tokens_ = in_.inverted || in_.tokens >= in_.queries;
    const int64_t units = by_tokens_ ? blocking_.tiles : blocking_.blocks;
    parts_ = heads % parallel_.threads == 0 ? 1 : std::min(units, ceil_div(2 * parallel_.threads, heads));
    const int64_t dq_copies = by_tokens_ ? parts_ : 1, token_copies = by_tokens_ ? 1 : parts_;
    dq_size_ = blocking_.blocks * (packed_.d + 2) * W;
    const Aligned<T> dq_sums(heads * dq_copies * dq_size_);
    // Sums of dk and dv go straight where they belong when rows need no padding, have one writer and are not rounded.
    const bool learn = dk.data != nullptr, direct = !kPairs && token_copies == 1;
    const bool k_joined = learn && !(direct && packed_.pad_d == packed_.d);
    const bool v_joined = learn && !(direct && packed_.pad_v == packed_.v);
    const Aligned<T> dk_sums(k_joined ? heads * token_copies * M * packed_.pad_d : 0);
    const Aligned<T> dv_sums(v_joined ? heads * token_copies * M * packed_.pad_v : 0);
    dq_ = dq_sums.get();
    // A part's copy of them is a head of these.
    const int64_t copies = token_copies * in_.heads;
    dk_ = k_joined ? dense_heads(dk_sums.get(), copies, M, packed_.pad_d) : as_sums(dk);
    dv_ = v_joined ? dense_heads(dv_sums.get(), copies, M, packed_.pad_v) : as_sums(dv);

    flagged_.assign(heads * blocking_.blocks, 1);
    each_part(false);
    add_copies(dq_, heads, dq_copies, dq_size_);
    if (!in_.inverted && find_errors(d_lse, dq_copies)) {
      each_part(true);
      add_copies(dq_, heads, dq_copies, dq_size_);
    }
    unpack(dq_copies, dq);
    if (k_joined) join_tokens(dk_sums.get(), token_copies, packed_.pad_d, dk, in_.dim, kPairs ? T(in_.scale) : T(1));
    if (v_joined) join_tokens(dv_sums.get(), token_copies, packed_.pad_v, dv, in_.dim_v, T(1));
  }

 private:
  // Gradients of keys and values that are summed where they belong; of pairs, which are not, only none.
  static HeadMatrix<T> as_sums(const HeadMatrix<X>& to) {
    if constexpr (kPairs)
      return {};
    else
      return to;
  }

  void pack(int64_t head, int64_t block, T* at, Hash* hashes) const {
    const int64_t W = blocking_.width, row = head * in_.queries + block * W, count = blocking_.count_of(block);
    const X *q = in_.q.at(head / in_.heads, head % in_.heads, block * W), *d_o = d_o_ + row * in_.dim_v;
    pack_queries(blocking_, head, block, packed_.q(at));
    for (int64_t lane = 0; lane < W; ++lane)
      packed_.weight(at)[lane] = lane < count ? queries_.weight[row + lane] * T(in_.dropout.scale()) : T(0);
    const T* weight = packed_.weight(at);
    rows_to_lanes(d_o, in_.dim_v, count, in_.dim_v, W, weight, packed_.grad(at));
    OperandOf<X>*q_rows = packed_.q_rows(at), *grad_rows = packed_.grad_rows(at);
    std::fill(q_rows, grad_rows + packed_.rows() * packed_.pad_v, OperandOf<X>{});
    if constexpr (kPairs) {
      pair_rows(q, in_.q.row_stride, count, in_.dim, packed_.pad_d, q_rows);
      pair_rows(d_o, in_.dim_v, count, in_.dim_v, packed_.pad_v, grad_rows);
    } else {
      for (int64_t lane = 0; lane < count; ++lane, q += in_.q.row_stride, d_o += in_.dim_v) {
        for (int64_t c = 0; c < in_.dim; ++c) q_rows[lane * packed_.pad_d + c] = T(in_.scale) * q[c];
        for (int64_t c = 0; c < in_.dim_v; ++c) grad_rows[lane * packed_.pad_v + c] = weight[lane] * d_o[c];
      }
    }
    for (int64_t lane = 0; lane < W; ++lane) {
      // A lane without a query: its weights become zero.
      packed_.shift(at)[lane] = lane < count ? queries_.shift[row + lane] : -std::numeric_limits<T>::infinity();
      packed_.delta(at)[lane] = lane < count ? queries_.delta[row + lane] : T(0);
      packed_.delta_low(at)[lane] = lane < count ? queries_.delta_low[row + lane] : T(0);
      packed_.change(at)[lane] = lane < count && !change_.empty() ? change_[row + lane] : T(0);
    }
    if (in_.dropout) pack_hashes(blocking_, head, block, hashes);
  }

  // A packed block as the kernels see it, without a place for its gradients.
  BackwardBlock<X> view(T* at, const Hash* hashes, T* p, T* ds) const {
    BackwardBlock<X> block{};
    block.q = packed_.q(at);
    block.shift = packed_.shift(at);
    block.grad = packed_.grad(at);
    block.delta = packed_.delta(at);
    block.delta_low = packed_.delta_low(at);
    block.weight = packed_.weight(at);
    block.q_rows = packed_.q_rows(at);
    block.grad_rows = packed_.grad_rows(at);
    block.pad_d = packed_.pad_d;
    block.pad_v = packed_.pad_v;
    block.hashes = hashes;
    block.p = p;
    block.ds = ds;
    return block;
  }

  void each_part(bool correction) {
    parallel_.run(blocking_.heads() * parts_, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) run_part(task / parts_, task % parts_, correction);
    });
  }

  // One part of a head: all flagged blocks and some tiles, or some of the flagged blocks and all tiles.
  void run_part(int64_t head, int64_t part, bool correction) const {
    const auto share = [&](int64_t n, int64_t i) { return n * i / parts_; };
    const int64_t tile0 = by_tokens_ ? share(blocking_.tiles, part) : 0;
    const int64_t tile1 = by_tokens_ ? share(blocking_.tiles, part + 1) : blocking_.tiles;
    std::vector<int64_t> blocks;
    for (int64_t i = by_tokens_ ? 0 : share(blocking_.blocks, part);
         i < (by_tokens_ ? blocking_.blocks : share(blocking_.blocks, part + 1)); ++i)
      if (flagged_[head * blocking_.blocks + i]) blocks.push_back(i);
    T* dq = dq_ + (by_tokens_ ? head * parts_ + part : head) * dq_size_;
    const int64_t batch = head / in_.heads, own = by_tokens_ ? head % in_.heads : head % in_.heads * parts_ + part;
    // A correction is added to the results of the first pass. By then the first copy of dq is the sum of all copies, so
    // the others start at zero again.
    if (!correction) {
      for (int64_t i : blocks) std::fill_n(dq + i * dq_block(), dq_block(), T(0));
    } else if (by_tokens_ && part > 0) {
      std::fill_n(dq, dq_size_, T(0));
    }
    if (!correction && dk_.data) {
      const int64_t m0 = tile0 * kTileTokens, m1 = std::min(tile1 * kTileTokens, in_.tokens);
      for (int64_t m = m0; m < m1; ++m) {
        std::fill_n(dk_.at(batch, own, m), packed_.pad_d, T(0));
        std::fill_n(dv_.at(batch, own, m), packed_.pad_v, T(0));
      }
    }
    const int64_t W = blocking_.width, size = packed_.size();
    const Aligned<T> memory(group_ * size), p(kTileTokens * W), ds(kTileTokens * W);
    const Aligned<OperandOf<X>> rows(kPairs ? kTileTokens * packed_.rows() : 0);
    const TilePairs<X> pairs(in_, true);
    std::vector<Hash> hashes(group_ * W);
    for (size_t first = 0; first < blocks.size(); first += group_) {
      const int64_t count = std::min<int64_t>(group_, int64_t(blocks.size() - first));
      for (int64_t i = 0; i < count; ++i) pack(head, blocks[first + i], memory.get() + i * size, hashes.data() + i * W);
      for (int64_t tile = tile0; tile < tile1; ++tile) {
        TokenTile<X> tokens = tile_of(blocking_, terms_, head, tile);
        pairs.set(tokens);
        for (int64_t i = 0; i < count; ++i) {
          T* at = memory.get() + i * size;
          BackwardBlock<X> block = view(at, hashes.data() + i * W, p.get(), ds.get());
          block.rows = rows.get();
          block.dq = dq + blocks[first + i] * dq_block();
          block.sum = block.dq + packed_.d * W;
          block.size = block.sum + W;
          block.dk = dk_.data ? dk_.at(batch, own, tile * kTileTokens) : nullptr;
          block.dv = dv_.data ? dv_.at(batch, own, tile * kTileTokens) : nullptr;
          block.dk_row = dk_.row_stride;
          block.dv_row = dv_.row_stride;
          if (correction)
            blocking_.kernels.correct(tokens, block, packed_.change(at));
          else
            blocking_.kernels.backward(tokens, block);
        }
      }
    }
  }

  // Over the tokens dS sums to d_lse. What it sums to beside that is the error of delta, which was computed from
  // rounded outputs. It does not matter beside dS of ordinary size; where softmax is saturated dS is tiny, and the
  // block gets a second pass that takes the error out.
  bool find_errors(const double* d_lse, int64_t copies) {
    const T tolerance = 16 * std::numeric_limits<T>::epsilon();
    const int64_t W = blocking_.width;
    change_.assign(queries_.shift.size(), T(0));
    flagged_.assign(blocking_.heads() * blocking_.blocks, 0);
    bool any = false;
    for (int64_t i = 0; i < blocking_.heads() * blocking_.blocks; ++i) {
      const int64_t head = i / blocking_.blocks, block = i % blocking_.blocks, row = head * in_.queries + block * W;
      const T* sum = dq_ + head * copies * dq_size_ + block * dq_block() + packed_.d * W;
      for (int64_t lane = 0; lane < blocking_.count_of(block); ++lane) {
        if (terms_.uniform[head / in_.heads]) continue;  // there is no dS
        const T error = sum[lane] - (d_lse == nullptr ? T(0) : T(d_lse[row + lane]));
        change_[row + lane] = error * queries_.weight[row + lane];
        if (std::abs(error) > tolerance * sum[W + lane]) flagged_[i] = any = true;
      }
    }
    return any;
  }

  // Adds the copies of every head to its first.
  void add_copies(T* data, int64_t heads, int64_t copies, int64_t size) const {
    if (copies == 1) return;
    constexpr int64_t kChunk = 4096;
    const int64_t chunks = ceil_div(size, kChunk);
    parallel_.run(heads * chunks, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        T* head = data + task / chunks * copies * size;
        const int64_t i0 = task % chunks * kChunk, i1 = std::min(i0 + kChunk, size);
        for (int64_t copy = 1; copy < copies; ++copy)
          for (int64_t i = i0; i < i1; ++i) head[i] += head[copy * size + i];
      }
    });
  }

  void unpack(int64_t dq_copies, X* dq) const {
    const std::vector<T> scale(blocking_.width, T(in_.scale));
    parallel_.run(blocking_.heads() * blocking_.blocks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / blocking_.blocks, block = i % blocking_.blocks;
        lanes_to_rows(dq_ + head * dq_copies * dq_size_ + block * dq_block(), in_.dim, blocking_.width, scale.data(),
                      blocking_.count_of(block), dq + (head * in_.queries + block * blocking_.width) * in_.dim,
                      in_.dim);
      }
    });
  }

  // `factor` times the sums of all copies' rows, without what pads these.
  void join_tokens(T* from, int64_t copies, int64_t padded, const HeadMatrix<X>& to, int64_t channels, T factor) const {
    add_copies(from, blocking_.heads(), copies, in_.tokens * padded);
    parallel_.run(blocking_.heads() * in_.tokens, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / in_.tokens, m = i % in_.tokens;
        const T* sums = from + (head * copies * in_.tokens + m) * padded;
        X* row = to.at(head / in_.heads, head % in_.heads, m);
        for (int64_t c = 0; c < channels; ++c) row[c] = narrowed<X>(factor * sums[c]);
      }
    });
  }

  int64_t dq_block() const { return (packed_.d + 2) * blocking_.width; }  // [dim] rows of dq, sums of dS, sums of |dS|

  const CrossAttentionBlocking<X>& blocking_;
  const CrossAttentionInput<X>& in_;
  TokenTerms<T>& terms_;
  QueryTerms<T>& queries_;
  const X* d_o_;
  const Parallel& parallel_;
  const PackedBlock<X> packed_;
  const int64_t group_;
  bool by_tokens_ = true;
  int64_t parts_ = 1, dq_size_ = 0;
  T* dq_ = nullptr;
  HeadMatrix<T> dk_{}, dv_{};
  std::vector<char> flagged_;  // blocks to work on
  std::vector<T> change_;      // by how much delta was off, times the weight
};

template <class X, class T>
void stream_backward(const CrossAttentionInput<X>& in, const T* o, const double* lse, const double* token_lse,
                     const X* d_o, const double* d_lse, X* dq, const HeadMatrix<X>& dk, const HeadMatrix<X>& dv,
                     const Parallel& parallel) {
  const CrossAttentionBlocking<X> blocking(in);
  TokenTerms<T> terms(in.batch, in.heads, in.tokens, in.mask, in.inverted ? token_lse : nullptr, in.dropout);
  QueryTerms<T> queries(in, terms, o, lse, d_o, d_lse, parallel);
  Backward<X> backward(blocking, terms, queries, d_o, parallel);
  if constexpr (!std::is_same_v<X, BFloat16>) {
    if (in.inverted) backward.find_query_delta_low(lse, d_lse);
    for (int pass = 0; in.inverted && pass < 2; ++pass) backward.find_token_delta(pass);
  }
  backward.run(d_lse, dq, dk, dv);
}

void widened_backward(const CrossAttentionInput<BFloat16>& in, const float* o, const double* lse,
                      const double* token_lse, const BFloat16* d_o, const double* d_lse, BFloat16* dq,
                      const HeadMatrix<BFloat16>& dk, const HeadMatrix<BFloat16>& dv, const Parallel& parallel) {
  const int64_t B = in.batch, H = in.heads, N = in.queries, M = in.tokens, d = in.dim, v = in.dim_v;
  const bool learn = dk.data != nullptr;
  const Widened wide(in, parallel);
  const WidenedRows grad(dense_heads(d_o, H, N, v), B, H, N, v, parallel);
  const Aligned<float> to_q(B * H * N * d), to_k(learn ? B * H * M * d : 0), to_v(learn ? B * H * M * v : 0);
  const HeadMatrix<float> none{};
  cross_attention_backward(wide.input(), o, lse, token_lse, grad.view().data, d_lse, to_q.get(),
                           learn ? dense_heads(to_k.get(), H, M, d) : none,
                           learn ? dense_heads(to_v.get(), H, M, v) : none, parallel);
  narrow_rows(to_q.get(), B, H, N, d, dense_heads(dq, H, N, d), parallel);
  if (!learn) return;
  narrow_rows(to_k.get(), B, H, M, d, dk, parallel);
  narrow_rows(to_v.get(), B, H, M, v, dv, parallel);
}

}  // namespace

template <class X>
void cross_attention_backward(const CrossAttentionInput<X>& in, const ComputeOf<X>* o, const double* lse,
                              const double* token_lse, const X* d_o, const double* d_lse, X* dq,
                              const HeadMatrix<X>& dk, const HeadMatrix<X>& dv, const Parallel& parallel) {
  if constexpr (std::is_same_v<X, BFloat16>) {
    if (!takes_pairs(in)) return widened_backward(in, o, lse, token_lse, d_o, d_lse, dq, dk, dv, parallel);
  } else {
    if (FewAttention<X>::takes(in)) return FewAttention<X>(in).backward(d_o, d_lse, dq, dk, dv, parallel);
  }
  stream_backward(in, o, lse, token_lse, d_o, d_lse, dq, dk, dv, parallel);
}

#define PF_INSTANTIATE(X)                                                                                        \
  template void cross_attention_backward<X>(const CrossAttentionInput<X>&, const ComputeOf<X>*, const double*,   \
                                            const double*, const X*, const double*, X*, const HeadMatrix<X>&,    \
                                            const HeadMatrix<X>&, const Parallel&);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)
PF_INSTANTIATE(BFloat16)
#undef PF_INSTANTIATE

}  // namespace perceiver_fast
