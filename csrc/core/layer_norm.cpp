// Drivers of LayerNorm of a residual stream, and its gradients:
//
//   y = x + branch + branch_bias      z = (y - mean(y)) / sqrt(var(y) + eps) * weight + bias
//
// Rows are shared out to the threads. Gradients of weight, bias and branch_bias are sums over rows, by row_parts.h: the
// same whatever the number of threads. Memory: 3 n sums for each of at most kMostParts parts and for each thread.
#include "layer_norm.h"

#include "row_parts.h"

namespace perceiver_fast {

template <class D>
void layer_norm_forward(const LayerNormForward<D>& call, const Parallel& parallel) {
  const auto& kernels = layer_norm_kernels<D>(active_isa());
  for_rows(call.rows, call.columns, parallel,
           [&](int64_t begin, int64_t end) { kernels.forward(call, begin, end); });
}

template <class D>
void layer_norm_backward(const LayerNormBackward<D>& call, const Parallel& parallel) {
  using S = typename D::Wide;
  using T = typename D::T;
  const auto& kernels = layer_norm_kernels<D>(active_isa());
  const int64_t n = call.columns;
  const auto sums = sum_rows<T>(call.rows, n, 3 * n, parallel, [&](int64_t begin, int64_t end, T* sums) {
    kernels.backward(call, begin, end, sums);
  });
  S* const gradients[] = {call.d_weight, call.d_bias, call.d_branch_bias};
  for (int k = 0; k < 3; ++k)
    for (int64_t i = 0; gradients[k] != nullptr && i < n; ++i) store_sum(sums.get()[k * n + i], gradients[k] + i);
}

#define PF_INSTANTIATE(D)                                                           \
  template void layer_norm_forward<D>(const LayerNormForward<D>&, const Parallel&);       \
  template void layer_norm_backward<D>(const LayerNormBackward<D>&, const Parallel&);
PF_FOR_DTYPES(PF_INSTANTIATE)

}  // namespace perceiver_fast
