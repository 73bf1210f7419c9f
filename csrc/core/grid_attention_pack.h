// Packing for grid attention: tokens as (r, r x, bias) records, queries as tables with one query a lane.
#pragma once

#include <vector>

#include "aligned.h"
#include "grid_attention.h"
#include "lanes.h"
#include "grid_attention_block.h"

namespace perceiver_fast {

// Smallest and largest value of r and of every r x_f over the tokens of one batch element, and the largest |r x|^2.
template <class T>
struct TokenBounds {
  std::vector<T> low, high;  // [1 + F], r first
  T square;
};

template <class T>
struct PackedTokens {
  Aligned<T> data;                     // [B][M][F + 2], see grid_attention_block.h
  std::vector<TokenBounds<T>> bounds;  // [B]
  std::vector<char> all_masked;        // [B]: attends uniformly, whatever its queries
  std::vector<char> constant;          // [B]: that, or one visible token: the outputs do not depend on the queries
};

template <class T>
PackedTokens<T> pack_tokens(const GridAttentionInput<T>& in, int64_t tokens, const Parallel& parallel);

// bound[lane] >= S of every token, from the extremes of the tables and of the tokens alone.
template <class T>
void bound_logits(const T* table, const std::vector<int64_t>& sizes, int64_t features, int lanes,
                  const TokenBounds<T>& bounds, T* bound);

}  // namespace perceiver_fast
