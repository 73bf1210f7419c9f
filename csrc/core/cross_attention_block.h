// What the per-ISA kernels of streaming attention work on, and the table they are reached through.
//
// A block is `queries` queries of one batch element and head (two vectors), transposed so that a query is a lane; a
// tile is up to kTileTokens tokens, read where they lie. Logits and weights of one tile and block are a
// [tokens][queries] scratch that stays in L1. Exponents are of two and shifted by integers, which costs no bit, so that
// forward and backward agree on every weight.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "kernel_tables.h"

namespace perceiver_fast {

constexpr int64_t kTileTokens = 128;

template <class T>
struct TokenTile {
  int64_t dim, dim_v, count;
  const T *k, *v;
  int64_t k_row, v_row;
  // What is added to the exponents of a token's weights and what they are multiplied by, or null where no token has
  // either. A masked token has a shift of -inf. Inverted attention's backward subtracts delta, a sum of two numbers,
  // from the gradients of the weights.
  const T *shift, *weight, *delta, *delta_low;
  const uint32_t* hashes;  // of dropout
  uint32_t threshold;    // of dropout; zero: none
  bool uniform;          // every token is masked: all get one weight, whatever q and k are
};

// out += p v and total += p with p = 2^(S + shift). Where the shift turns out to be unfit for a tile's logits, it is
// changed, and out and total are scaled to match.
template <class T>
struct ForwardBlock {
  const T* q;  // [dim][queries], times scale log2(e)
  T *shift, *total;  // [queries]
  T* out;            // [dim_v][queries]
  const typename HashLane<T>::type* hashes;
  T* scratch;  // [kTileTokens][queries]
};

// With p = 2^(S + shift) and dS = p (v grad - delta):  dq += dS k, dk += dS q_rows, dv += p grad_rows.
template <class T>
struct BackwardBlock {
  const T *q, *shift;            // as in the forward
  const T *grad, *delta;         // [dim_v][queries], [queries]: times the weight that makes P of p
  const T* delta_low;            // [queries], of inverted attention: the rounding error of delta
  const T *q_rows, *grad_rows;   // [queries][pad_d], [queries][pad_v]: q times the logits' scale
  int64_t pad_d, pad_v;          // dim and dim_v rounded up to whole vectors
  T* dq;                         // [dim][queries]
  T *dk, *dv;                    // [count][dk_row], [count][dv_row]: pad_d and pad_v numbers of each are written; or null
  int64_t dk_row, dv_row;
  T *sum, *size;                 // [queries]: sums of dS and of |dS|
  const typename HashLane<T>::type* hashes;
  T *p, *ds;  // scratch [kTileTokens][queries] each
};

template <class T>
struct CrossAttentionKernels {
  int lanes, queries;
  void (*forward)(const TokenTile<T>&, const ForwardBlock<T>&, bool fixed_shift);
  void (*backward)(const TokenTile<T>&, const BackwardBlock<T>&);
  // delta grew by `change`: what follows for dq and dk. Nothing else is touched.
  void (*correct)(const TokenTile<T>&, const BackwardBlock<T>&, const T* change);
  // Inverted attention. Running maximum and sum of 2^(S - maximum) of every token, [count][queries] each, lane by lane;
  // `bias` [queries] is -inf in lanes without a query.
  void (*token_sums)(const TokenTile<T>&, const T* q, const T* bias, T* maximum, T* sum, T* scratch);
  // sums [count][queries] += p (v grad - delta - delta_low - the token's delta).
  void (*token_delta)(const TokenTile<T>&, const BackwardBlock<T>&, T* sums);
};

PF_KERNEL_TABLES(CrossAttentionKernels, cross_attention)

}  // namespace perceiver_fast
