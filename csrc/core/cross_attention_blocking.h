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
#include "lanes.h"
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
  TilePairs(const CrossAttentionInput<X>& in, bool of_keys)
      : keys_(of_keys ? room(in.dim) : 0), values_(of_keys ? 0 : room(in.dim_v)), of_keys_(of_keys) {}

  void set(TokenTile<X>& tile) const {
    if constexpr (Operand<X>::numbers == 2) {
      if (of_keys_)
        tile.k_pairs = pair_rows(tile.k, tile.k_row, tile.count, tile.dim, tile.dim, keys_.get());
      else
        tile.v_pairs = pair_rows(tile.v, tile.v_row, tile.count, tile.dim_v, tile.dim_v, values_.get());
    }
  }

 private:
  static int64_t room(int64_t channels) { return Operand<X>::numbers == 2 ? kTileTokens / 2 * channels : 0; }
  const Aligned<OperandOf<X>> keys_, values_;
  const bool of_keys_;
};

// Queries of a block as the kernels take them: times scale log2(e) unless they are pairs.
template <class X>
void pack_queries(const CrossAttentionBlocking<X>& blocking, int64_t head, int64_t block, OperandOf<X>* q) {
  using T = ComputeOf<X>;
  const CrossAttentionInput<X>& in = blocking.in;
  const std::vector<T> factor(blocking.width, T(in.scale * kLog2OfE));
  rows_to_lanes(in.q.at(head / in.heads, head % in.heads, block * blocking.width), in.q.row_stride,
                blocking.count_of(block), in.dim, blocking.width, factor.data(), q);
}

template <class X>
void pack_hashes(const CrossAttentionBlocking<X>& blocking, int64_t head, int64_t block,
                 typename HashLane<ComputeOf<X>>::type* hashes) {
  for (int64_t lane = 0; lane < blocking.width; ++lane)
    hashes[lane] = blocking.in.dropout.query_hash(head * blocking.in.queries + block * blocking.width + lane);
}

}  // namespace perceiver_fast
