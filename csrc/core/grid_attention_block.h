// What the per-ISA kernels of grid attention work on, and the table they are reached through.
//
// A block is `lanes` queries of one batch element, one query a vector lane, against a box of tokens
// (rows x columns, a column being an index of the last axis). With queries in lanes a token is a handful
// of scalars, so ragged grids, any number of axes and any number of channels need no special case, and
// no sum ever crosses lanes.
//
// Packed layouts (L = F + sum of axis sizes; features first, then the axes in order):
//   tokens  [M][F + 2]  r, r*x_0 .. r*x_{F-1}, and the mask's bias (0 or -inf)
//   tables  [L][lanes]  one column of q log2(e) (or of the output's gradient) a row
//
// Every kernel computes a logit by the same operations in the same order, so that forward and backward agree on it
// to the last bit; exponents are shifted by integers, which costs no bit either.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "kernel_tables.h"

namespace perceiver_fast {

template <class T>
struct TokenBox {
  const T* tokens;             // [M][F + 2]
  int64_t features;            // F
  int64_t outer_axes;          // number of axes - 1
  const int64_t* outer_sizes;  // [outer_axes]
  int64_t inner_size;          // size of the last axis
  int64_t row_begin, row_end;  // rows: indices over the product of the outer axes
  int64_t col_begin, col_end;
  bool masked;
  // With inverted attention or dropout, [M] each, else null: what is added to the exponents of a token's weights (an
  // integer, or -inf for a masked token), what they are multiplied by, and what inverted attention's backward subtracts
  // from the gradients of the weights, a sum of two numbers. The hashes are dropout's; a threshold of zero drops
  // nothing.
  const T *shift, *weight, *delta, *delta_low;
  const uint32_t* hashes;
  uint32_t threshold;
};

// S are logits in base two, as q comes times log2(e); p = 2^(S + shift), and p' is p without the weights that dropout
// drops:
//
// Forward:  out[:L] += sum_m p' r [x, onehot], out[L] += sum_m p, and with dropout out[L + 1] += sum_m p'.
// Backward: out[:L] += sum_m dS r [x, onehot], out[L] += sum_m dS, with dS = p (u - delta) and
//           u = r grad.[x, onehot]; with dropout u = r grad.[x, onehot] + bonus, or zero for a weight that is dropped.
template <class T>
struct QueryBlock {
  const T* q;      // [L][lanes]
  const T* shift;  // [lanes], integral
  const T* grad;   // [L][lanes], backward only: gradient of the output times the weight that makes P of p
  const T* delta;  // [lanes], backward only, times the same weight
  const T* delta_low;  // [lanes], backward of inverted attention or with dropout only: the rounding error of delta
  const T* bonus;  // [lanes], backward with dropout only, times the same weight
  T* out;          // [L + 2][lanes]
  T* scratch;      // [2 * (F + 1)][lanes], sums of a row and of a block of rows
  const typename HashLane<T>::type* hashes;  // [lanes], of dropout
};

// Gradients of the tokens of a box, from all queries of one batch element:
//   dfeat[m] = r sum_n (dS q_feat[n] + P grad_feat[n]),   dscale[m] = sum_n (dS S + P r grad.[x, onehot]) / r
// with S in base e.
template <class T>
struct TokenGradient {
  int64_t queries;    // N
  int64_t length;     // L
  const T* q;         // [N][L], times log2(e)
  const T* grad;      // [N][L], times the weight that makes P of p
  const T* shift;     // [N], integral: p = 2^(S + shift), S in base two
  const T* delta;     // [N], times the same weight: dS = p (u - delta), u as above
  const T* delta_low; // [N], the rounding error of delta
  const T* bonus;     // [N], with dropout only, times the same weight
  const uint32_t* hashes;  // [N], of dropout
  const T* feat;      // [M][F]
  T* dfeat;           // [M][F]
  T* dscale;          // [M]
  T* row_sums;        // scratch [2 * N]
  T* columns;         // scratch [3 * F * lanes], aligned to a vector
};

template <class T>
struct GridAttentionKernels {
  int lanes;
  void (*forward)(const TokenBox<T>&, const QueryBlock<T>&);
  void (*backward)(const TokenBox<T>&, const QueryBlock<T>&);
  void (*maximum)(const TokenBox<T>&, const T* q, T* max);  // max [lanes] is raised to the largest S
  void (*token_gradient)(const TokenBox<T>&, const TokenGradient<T>&);
  // Inverted attention, [M] each. token_sums: log2 of the sum over the queries of 2^S, as a maximum and the sum of 2^(S
  // - maximum). token_delta: the sum over the queries of P times (its gradient - the box's delta); it needs neither
  // feat nor the outputs of TokenGradient.
  void (*token_sums)(const TokenBox<T>&, const TokenGradient<T>&, T* maximum, T* sum);
  void (*token_delta)(const TokenBox<T>&, const TokenGradient<T>&, T* delta);
};

PF_KERNEL_TABLES(GridAttentionKernels, grid_attention)

}  // namespace perceiver_fast
