// What the per-ISA kernels of grid_query_attention work on, and the table they are reached through.
//
// Queries stand in vector lanes. A strip is `width` (two vectors) consecutive queries of one row: columns of a grid
// whose outer axes have one index each, or consecutive points. A row's last strip may have fewer. A group is some
// consecutive strips: they take turns at a block of keys, so that it is read once for all of them. Trailing axes that
// are short are merged into one, whose table is the sum of theirs; "columns" is the size of what became the last
// axis.
//
// Logits are natural ones, with the roundings of plain PyTorch: they are multiplied by log2(e), for powers of two,
// where a shift has brought them near zero.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "kernel_tables.h"

namespace perceiver_fast {

// Queries of one batch element.
template <class T>
struct QueryRows {
  int64_t features;            // F
  bool grid;                   // else points: one row without tables of axes
  int64_t outer_axes;          // axes but for the columns'
  const int64_t* outer_sizes;  // [outer_axes]
  int64_t outer_total;         // sum of their sizes
  int64_t columns, strips;     // of a row
  int64_t queries;             // M
  const T* feat;               // [M][F]
  const T* scale;              // [M], or null: one
  bool blank;                  // all keys are masked: queries do not matter, and are taken for zero
};

// The keys of one batch element and head, but for the masked ones. Where all are masked they are all here, and
// attended to uniformly: their tables and biases are zero.
template <class T>
struct QueryKeys {
  int64_t count;
  const T* feat;     // [count][F]
  const T* outer;    // [outer_total][count]: an index of an outer axis a row
  const T* columns;  // [strips][count][width]
  const T* bias;     // [count]
  const T* bias_log2;  // [count]: times log2(e)
  const T* v;        // [count][C]
  const T* panels;   // the same in panels of `panel` channels, [C / panel][count][panel]; null with few channels
  const uint32_t* hashes;  // [count], of dropout
  // No logit's part by axes, and no bias, is larger in magnitude than these, and no row of feat is longer.
  T axes_bound, bias_bound, feat_bound;
};

// A group of strips of one batch element, packed.
template <class T>
struct QueryGroup {
  int64_t first, count;  // strips
  T* x;                  // [count][F][width]: r x
  T* r;                  // [count][width]: scales; zero in lanes without a query
};

template <class T>
struct QueryForward {
  int64_t channels;
  T* o;                       // of the batch element and head
  int64_t query_stride;       // of o
  bool add;                   // to what o holds
  double* lse;                // [M], or null
  const typename HashLane<T>::type* hashes;  // [count][width], of dropout
  uint32_t threshold;         // of dropout; zero: none
  T keep_scale;               // of dropout
  T* scratch;                 // GridQueryKernels::forward_scratch numbers
};

template <class T>
struct QueryBackward {
  int64_t channels;
  const T* d_o;               // of the batch element and head
  int64_t query_stride;       // of d_o
  const double* lse;          // [M]
  bool constant;              // weights do not depend on logits: one key, or all masked
  const typename HashLane<T>::type* hashes;
  uint32_t threshold;
  T keep_scale;
  // Sums over queries are added to these. Keys' extra columns are F of the raw channels, then the sum of r dS, which
  // is no output, then the gradient of the bias; rows are padded to whole vectors, as those of v.
  T* d_outer;                 // [outer_total][keys]
  T* d_columns;               // [strips][keys][width]
  T* d_extra;                 // [keys][extra]
  T* d_v;                     // [keys][padded C]
  // Sums over keys, and over heads: of dS feat [count][F][width], and of dS times the part by axes [count][width]. Null
  // where tokens need no gradients.
  T *d_x, *d_r;
  T* scratch;                 // GridQueryKernels::backward_scratch numbers
};

template <class T>
struct GridQueryKernels {
  int lanes, width, panel;
  int64_t few;  // channels of values up to which panels are not needed
  void (*pack)(const QueryRows<T>&, const QueryGroup<T>&);
  int64_t (*forward_scratch)(int64_t strips, int64_t features, int64_t channels);
  void (*forward)(const QueryRows<T>&, const QueryKeys<T>&, const QueryGroup<T>&, const QueryForward<T>&);
  int64_t (*backward_scratch)(int64_t strips, int64_t features, int64_t channels, int64_t keys);
  void (*backward)(const QueryRows<T>&, const QueryKeys<T>&, const QueryGroup<T>&, const QueryBackward<T>&);
  // d_feat [M][F] and d_scale [M] of a group from the sums d_x and d_r, which are changed.
  void (*finish)(const QueryRows<T>&, const QueryGroup<T>&, T* d_x, const T* d_r, T* d_feat, T* d_scale);
};

PF_KERNEL_TABLES(GridQueryKernels, grid_query_attention)

}  // namespace perceiver_fast
