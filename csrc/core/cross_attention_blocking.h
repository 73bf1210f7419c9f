// What the forward and the backward driver of streaming attention share: blocks of queries, tiles of tokens, packing.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "aligned.h"
#include "cross_attention.h"
#include "cross_attention_block.h"
#include "cross_attention_pairs.h"
#include "token_terms.h"

namespace perceiver_fast {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class X>
const CrossAttentionKernels<X>& kernels_for() {
  return cross_attention_kernels<X>(active_isa());
}
template <>
inline const CrossAttentionKernels<BFloat16>& kernels_for<BFloat16>() {
  return *bfloat16_cross_attention_kernels();  // takes_pairs has asked for them
}

template <class X>
struct CrossAttentionBlocking {
  using T = ComputeOf<X>;
  const CrossAttentionInput<X>& in;
  const CrossAttentionKernels<X>& kernels;
  int64_t width, blocks, tiles;  // queries of a block; blocks of queries and tiles of tokens of one head

  explicit CrossAttentionBlocking(const CrossAttentionInput<X>& input)
      : in(input),
        kernels(kernels_for<X>()),
        width(kernels.queries),
        blocks(ceil_div(input.queries, width)),
        tiles(ceil_div(input.tokens, kTileTokens)) {}

  int64_t heads() const { return in.batch * in.heads; }
  int64_t count_of(int64_t block) const { return std::min(width, in.queries - block * width); }
  int64_t padded(int64_t channels) const { return ceil_div(channels, kernels.lanes) * kernels.lanes; }

  // Blocks that are worked on together, so that a tile is read from memory once for all of them: as many as keep
  // `floats` numbers a block in half a typical second-level cache.
  int64_t group_size(int64_t floats) const {
    constexpr int64_t kCache = 512 << 10;
    const int64_t most = std::max<int64_t>(1, kCache / (floats * int64_t(sizeof(T))));
    return blocks == 0 ? 1 : ceil_div(blocks, ceil_div(blocks, most));  // groups of one size
  }
};

template <class X>
TokenTile<X> tile_of(const CrossAttentionBlocking<X>& blocking, const TokenTerms<ComputeOf<X>>& terms, int64_t head,
                     int64_t tile) {
  using T = ComputeOf<X>;
  const CrossAttentionInput<X>& in = blocking.in;
  const int64_t b = head / in.heads, h = head % in.heads, m = tile * kTileTokens;
  const int64_t row = terms.row(head) + m;
  const bool biased = !terms.empty();
  return {in.dim,
          in.dim_v,
          std::min(kTileTokens, in.tokens - m),
          in.k.at(b, h, m),
          in.v.at(b, h, m),
          in.k.row_stride,
          in.v.row_stride,
          biased ? terms.shift.data() + row : nullptr,
          biased ? terms.weight.data() + row : nullptr,
          biased ? terms.delta.data() + row : nullptr,
          biased ? terms.delta_low.data() + row : nullptr,
          terms.hashes.empty() ? nullptr : terms.hashes.data() + m,
          in.dropout.threshold,
          terms.uniform[b] != 0,
          T(in.scale * kLog2OfE),
          nullptr,
          nullptr};
}

// The pairs of tokens that products along the tokens want of BFloat16, for one tile after the other.
template <class X>
class TilePairs {
 public:
  TilePairs(const CrossAttentionBlocking<X>& blocking, bool of_keys)
      : kernels_(blocking.kernels),
        of_keys_(of_keys),
        channels_(of_keys ? blocking.in.dim : blocking.in.dim_v),
        pairs_(Operand<X>::numbers == 2 ? kTileTokens / 2 * channels_ : 0) {}

  void set(TokenTile<X>& tile) const {
    if (Operand<X>::numbers == 1) return;
    if (of_keys_)
      kernels_.pair_rows(tile.count, channels_, tile.k, tile.k_row, channels_, pairs_.get());
    else
      kernels_.pair_rows(tile.count, channels_, tile.v, tile.v_row, channels_, pairs_.get());
    (of_keys_ ? tile.k_pairs : tile.v_pairs) = pairs_.get();
  }

 private:
  const CrossAttentionKernels<X>& kernels_;
  const bool of_keys_;
  const int64_t channels_;
  const Aligned<OperandOf<X>> pairs_;
};

// table[c][lane] = factor[lane] * rows[lane][c] for `count` rows, zero in the other lanes of a block. Pairs are of two
// neighbours in a row, and no factor multiplies them.
template <class X>
void rows_to_block(const CrossAttentionBlocking<X>& blocking, const X* rows, int64_t row_stride, int64_t count,
                   int64_t length, const ComputeOf<X>* factor, OperandOf<X>* table) {
  using T = ComputeOf<X>;
  constexpr int64_t numbers = Operand<X>::numbers;
  const int64_t width = blocking.width, size = operands<X>(length);
  T* lanes = reinterpret_cast<T*>(table);
  if (count < width) std::fill_n(lanes, size * width, T(0));
  blocking.kernels.transpose(count, size, reinterpret_cast<const T*>(rows), row_stride / numbers, lanes, width);
  if (numbers == 2) return;
  for (int64_t c = 0; c < size; ++c)
    for (int64_t lane = 0; lane < width; ++lane) lanes[c * width + lane] *= factor[lane];
}

// rows[lane][c] = factor[lane] * table[c][lane] for `count` rows. `scratch` has width times length numbers.
template <class X, class To>
void block_to_rows(const CrossAttentionBlocking<X>& blocking, const ComputeOf<X>* table, int64_t length,
                   const ComputeOf<X>* factor, int64_t count, ComputeOf<X>* scratch, To* rows, int64_t row_stride) {
  blocking.kernels.transpose(length, count, table, blocking.width, scratch, length);
  for (int64_t lane = 0; lane < count; ++lane, rows += row_stride) {
    if constexpr (std::is_same_v<To, X>)
      blocking.kernels.scale(length, factor[lane], scratch + lane * length, rows);
    else
      for (int64_t c = 0; c < length; ++c) rows[c] = factor[lane] * scratch[lane * length + c];
  }
}

// Queries of a block as the kernels take them: times scale log2(e) unless they are pairs.
template <class X>
void pack_queries(const CrossAttentionBlocking<X>& blocking, int64_t head, int64_t block, OperandOf<X>* q) {
  using T = ComputeOf<X>;
  const CrossAttentionInput<X>& in = blocking.in;
  const std::vector<T> factor(blocking.width, T(in.scale * kLog2OfE));
  rows_to_block(blocking, in.q.at(head / in.heads, head % in.heads, block * blocking.width), in.q.row_stride,
                blocking.count_of(block), in.dim, factor.data(), q);
}

template <class X>
void pack_hashes(const CrossAttentionBlocking<X>& blocking, int64_t head, int64_t block,
                 typename HashLane<ComputeOf<X>>::type* hashes) {
  for (int64_t lane = 0; lane < blocking.width; ++lane)
    hashes[lane] = blocking.in.dropout.query_hash(head * blocking.in.queries + block * blocking.width + lane);
}

}  // namespace perceiver_fast
