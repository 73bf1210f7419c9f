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
#include "pairs.h"

namespace perceiver_fast {

constexpr int64_t kTileTokens = 128;

// X is what queries, keys and values are: float, double or BFloat16. T is what is computed in, and an operand (pairs.h) is a
// number of a product, or two neighbours along its sum.
template <class X>
struct TokenTile {
  using T = ComputeOf<X>;
  int64_t dim, dim_v, count;
  const X *k, *v;
  int64_t k_row, v_row;
  // What is added to the exponents of a token's weights and what they are multiplied by, or null where no token has
  // either. A masked token has a shift of -inf. Inverted attention's backward subtracts delta, a sum of two numbers,
  // from the gradients of the weights.
  const T *shift, *weight, *delta, *delta_low;
  const uint32_t* hashes;  // of dropout
  uint32_t threshold;    // of dropout; zero: none
  bool uniform;          // every token is masked: all get one weight, whatever q and k are
  T factor;              // BFloat16: what logits are multiplied by, which queries are not
  const OperandOf<X> *k_pairs, *v_pairs;  // BFloat16: pairs of tokens, [count / 2][dim] and [count / 2][dim_v]
};

// out += p v and total += p with p = 2^(S + shift). Where the shift turns out to be unfit for a tile's logits, it is
// changed, and out and total are scaled to match.
template <class X>
struct ForwardBlock {
  using T = ComputeOf<X>;
  const OperandOf<X>* q;  // [dim][queries], times scale log2(e) unless BFloat16
  T *shift, *total;  // [queries]
  T* out;            // [dim_v][queries]
  const typename HashLane<T>::type* hashes;
  T* scratch;  // [kTileTokens][queries]
};

// With p = 2^(S + shift) and dS = p (v grad - delta):  dq += dS k, dk += dS q_rows, dv += p grad_rows.
template <class X>
struct BackwardBlock {
  using T = ComputeOf<X>;
  using Op = OperandOf<X>;
  const Op* q;                    // as in the forward
  const T* shift;
  const Op* grad;                 // [dim_v][queries]: times the weight that makes P of p, unless BFloat16
  const T* delta;                 // [queries]: times that weight
  const T* delta_low;             // [queries], of inverted attention: the rounding error of delta
  const T* weight;                // [queries], of BFloat16: that weight, with dropout's scale
  const Op *q_rows, *grad_rows;   // [queries][pad_d], [queries][pad_v]: q times the logits' scale, unless BFloat16
  int64_t pad_d, pad_v;           // dim and dim_v rounded up to whole vectors
  T* dq;                          // [dim][queries]
  T *dk, *dv;                     // [count][dk_row], [count][dv_row]: pad_d and pad_v numbers of each are written; or null
  int64_t dk_row, dv_row;
  T *sum, *size;                  // [queries]: sums of dS and of |dS|
  const typename HashLane<T>::type* hashes;
  T *p, *ds;  // scratch [kTileTokens][queries] each
  Op* rows;   // BFloat16: scratch [kTileTokens][queries]
};

template <class X>
struct CrossAttentionKernels {
  using T = ComputeOf<X>;
  int lanes, queries;
  // to [columns][to_row] = from [rows][from_row], transposed: numbers, or pairs in their place.
  void (*transpose)(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row);
  double (*dot)(int64_t count, const X* a, const T* b);  // in double
  // to[i] = factor * from[i].
  void (*scale)(int64_t count, T factor, const T* from, X* to);
  // Float: bfloat16 as float, and rounded.
  void (*widen)(int64_t count, const BFloat16* from, float* to);
  void (*narrow)(int64_t count, const float* from, BFloat16* to);
  // BFloat16: to[i / 2][c] = the pair rows[i][c], rows[i + 1][c] for `count` rows of `length`, zero where there is none; rows
  // of `to` are `padded` long.
  void (*pair_rows)(int64_t count, int64_t length, const X* rows, int64_t row_stride, int64_t padded, OperandOf<X>* to);
  void (*forward)(const TokenTile<X>&, const ForwardBlock<X>&, bool fixed_shift);
  void (*backward)(const TokenTile<X>&, const BackwardBlock<X>&);
  // delta grew by `change`: what follows for dq and dk. Nothing else is touched.
  void (*correct)(const TokenTile<X>&, const BackwardBlock<X>&, const T* change);
  // Inverted attention, which BFloat16 has not. Running maximum and sum of 2^(S - maximum) of every token,
  // [count][queries] each, lane by lane; `bias` [queries] is -inf in lanes without a query.
  void (*token_sums)(const TokenTile<X>&, const T* q, const T* bias, T* maximum, T* sum, T* scratch);
  // sums [count][queries] += p (v grad - delta - delta_low - the token's delta).
  void (*token_delta)(const TokenTile<X>&, const BackwardBlock<X>&, T* sums);
};

PF_KERNEL_TABLES(CrossAttentionKernels, cross_attention)

}  // namespace perceiver_fast
