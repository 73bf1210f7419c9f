// Inverted attention's backward needs sums over all queries of a head before any gradient: here they are found.
#pragma once

#include "cross_attention_tiles.h"
#include "parallel.h"

namespace perceiver_fast {

// What delta lacks, the sum of P (u - delta) over a query's tokens less d_lse. Where one token is all that a query has, the
// difference is nothing but rounding otherwise, and a query that hardly owns its tokens multiplies it by up to
// 1 / kInvertedEps. Before the tokens' deltas are known, which are zero here.
template <class T>
void find_query_delta_low(const BackwardTiles<T>& tiles, const Parallel& parallel) {
  const CrossAttentionBlocking<T>& blocking = tiles.blocking;
  QueryTerms<T>& queries = tiles.queries;
  const int64_t W = blocking.width;
  parallel.run(blocking.heads() * blocking.blocks, [&](int64_t begin, int64_t end) {
    const Aligned<T> memory(tiles.packed.size()), p(kTileTokens * W), ds(kTileTokens * W), sums(kTileTokens * W);
    std::vector<typename HashLane<T>::type> hashes(W);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / blocking.blocks, block = task % blocking.blocks;
      tiles.pack(head, block, memory.get(), hashes.data());
      std::vector<T> error(W);
      for (int64_t tile = 0; tile < blocking.tiles; ++tile) {
        const TokenTile<T> tokens = tile_of(blocking, tiles.terms, head, tile);
        std::fill_n(sums.get(), kTileTokens * W, T(0));
        blocking.kernels.token_delta(tokens, tiles.view(memory.get(), hashes.data(), p.get(), ds.get()), sums.get());
        for (int64_t lane = 0; lane < W; ++lane) {
          T sum = 0;
          for (int64_t m = 0; m < tokens.count; ++m) sum += sums.get()[m * W + lane];
          error[lane] += sum;
        }
      }
      for (int64_t lane = 0; lane < blocking.count_of(block); ++lane) {
        const int64_t row = head * blocking.in.queries + block * W + lane;
        if (!queries.clamped(row)) queries.delta_low[row] = (error[lane] - queries.d_lse(row)) * queries.weight[row];
      }
    }
  });
}

// What the softmax over the queries needs of every token, sum_n P dP. The second pass finds the rounding error of the first,
// so that a token that one query has all of gets its tiny gradients and not that error.
template <class T>
void find_token_delta(const BackwardTiles<T>& tiles, int pass, const Parallel& parallel) {
  const CrossAttentionBlocking<T>& blocking = tiles.blocking;
  const int64_t W = blocking.width;
  parallel.run(blocking.heads() * blocking.tiles, [&](int64_t begin, int64_t end) {
    const int64_t size = tiles.packed.size();
    const Aligned<T> memory(blocking.blocks * size), p(kTileTokens * W), ds(kTileTokens * W), sums(kTileTokens * W);
    std::vector<typename HashLane<T>::type> hashes(blocking.blocks * W);
    int64_t packed_head = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / blocking.tiles, tile = task % blocking.tiles;
      const TokenTile<T> tokens = tile_of(blocking, tiles.terms, head, tile);
      for (int64_t i = 0; i < blocking.blocks && head != packed_head; ++i)
        tiles.pack(head, i, memory.get() + i * size, hashes.data() + i * W);
      packed_head = head;
      std::fill_n(sums.get(), kTileTokens * W, T(0));
      for (int64_t i = 0; i < blocking.blocks; ++i)
        blocking.kernels.token_delta(
            tokens, tiles.view(memory.get() + i * size, hashes.data() + i * W, p.get(), ds.get()), sums.get());
      T* delta = (pass == 0 ? tiles.terms.delta : tiles.terms.delta_low).data() + tiles.terms.row(head) +
                 tile * kTileTokens;
      for (int64_t m = 0; m < tokens.count; ++m) {
        T sum = 0;
        for (int64_t lane = 0; lane < W; ++lane) sum += sums.get()[m * W + lane];
        delta[m] = sum;
      }
    }
  });
}

}  // namespace perceiver_fast
