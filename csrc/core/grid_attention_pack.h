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

// A token that is masked, or of an element that is all masked, and not finite: its record has zeros for what is not, so
// that no logit meets it. Results meet it all the same: perceiver-pytorch multiplies it by a weight, if only by zero.
struct SpoiledToken {
  int64_t b, m;
  double weight;  // of all queries
};

template <class T>
struct PackedTokens {
  Aligned<T> data;                     // [B][M][F + 2], see grid_attention_block.h
  std::vector<TokenBounds<T>> bounds;  // [B]
  std::vector<char> all_masked;        // [B]: attends uniformly, whatever its queries
  std::vector<char> constant;          // [B]: that, or one visible token: the outputs do not depend on the queries
  std::vector<SpoiledToken> spoiled;   // in order
};

template <class T>
PackedTokens<T> pack_tokens(const GridAttentionInput<T>& in, int64_t tokens, const Parallel& parallel);

// Adds to o [B, N, L] what spoiled tokens bring to it.
template <class T>
void add_spoiled(const GridAttentionInput<T>& in, const PackedTokens<T>& packed, int64_t tokens, T* o);

// bound[lane] >= S of every token, from the extremes of the tables and of the tokens alone.
template <class T>
void bound_logits(const T* table, const std::vector<int64_t>& sizes, int64_t features, int lanes,
                  const TokenBounds<T>& bounds, T* bound);

}  // namespace perceiver_fast
