// Drivers of GEGLU, u = value * gate * Phi(gate) with [value, gate] = h + bias, and its gradients.
//
// Rows are shared out to the threads. The gradient of the bias is a sum over rows, by row_parts.h: the same whatever
// the number of threads. Memory: with a bias, 2 F sums for each of at most kMostParts parts and for each thread.
#include "geglu.h"

#include "row_parts.h"

namespace perceiver_fast {

template <class D>
void geglu_forward(const GegluForward<D>& call, const Parallel& parallel) {
  const auto& kernels = geglu_kernels<D>(active_isa());
  for_rows(call.rows, call.features, parallel,
           [&](int64_t begin, int64_t end) { kernels.forward(call, begin, end); });
}

template <class D>
void geglu_backward(const GegluBackward<D>& call, const Parallel& parallel) {
  using T = typename D::T;
  const auto& kernels = geglu_kernels<D>(active_isa());
  if (call.d_bias == nullptr) {
    for_rows(call.rows, call.features, parallel,
             [&](int64_t begin, int64_t end) { kernels.backward(call, begin, end, nullptr); });
    return;
  }
  const int64_t width = 2 * call.features;
  const auto sums = sum_rows<T>(call.rows, call.features, width, parallel, [&](int64_t begin, int64_t end, T* sums) {
    kernels.backward(call, begin, end, sums);
  });
  for (int64_t i = 0; i < width; ++i) store_sum(sums.get()[i], call.d_bias + i);
}

#define PF_INSTANTIATE(D)                                                  \
  template void geglu_forward<D>(const GegluForward<D>&, const Parallel&);       \
  template void geglu_backward<D>(const GegluBackward<D>&, const Parallel&);
PF_FOR_DTYPES(PF_INSTANTIATE)

}  // namespace perceiver_fast
