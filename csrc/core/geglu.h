// GEGLU of a feed-forward's wide activations with their bias, on the CPU and free of torch. See
// perceiver_fast/ops/geglu.py for the maths.
//
// h [rows, 2 features] holds values, then gates. It is of dtype P as all that has rows is; the bias is of dtype B.
#pragma once

#include "dtypes.h"
#include "kernel_tables.h"
#include "parallel.h"

namespace perceiver_fast {

template <class D>
struct GegluForward {
  using B = typename D::Wide;
  using P = typename D::Narrow;
  int64_t rows, features;
  const P* h;
  const B* bias;  // [2 features], may be null
  P* u;           // [rows, features]
};

template <class D>
struct GegluBackward {
  using B = typename D::Wide;
  using P = typename D::Narrow;
  int64_t rows, features;
  const P *d_u, *h;
  const B* bias;  // may be null
  P *u, *d_h;
  B* d_bias;  // null where bias is
};

template <class D>
void geglu_forward(const GegluForward<D>& call, const Parallel& parallel);

template <class D>
void geglu_backward(const GegluBackward<D>& call, const Parallel& parallel);

// Kernels for rows [begin, end). The backward adds to sums, [2 features], d_h's over rows, unless it is null.
template <class D>
struct GegluKernels {
  void (*forward)(const GegluForward<D>& call, int64_t begin, int64_t end);
  void (*backward)(const GegluBackward<D>& call, int64_t begin, int64_t end, typename D::T* sums);
};

PF_KERNEL_TABLES(GegluKernels, geglu)

}  // namespace perceiver_fast
