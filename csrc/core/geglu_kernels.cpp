// GEGLU row by row, forward and backward in one pass each, for one instruction set.
#include "elements.h"
#include "geglu.h"
#include "normal_distribution.h"

namespace perceiver_fast {
namespace PF_ISA {

constexpr int64_t kSumColumns = 1024;  // features at a time where rows are summed: 8 KB of sums, which stay in L1

template <class D>
void geglu_rows(const GegluForward<D>& call, int64_t begin, int64_t end) {
  using T = typename D::T;
  const FlushDenormals flush;
  const int64_t F = call.features;
  const auto* bias = call.bias;
  for (int64_t r = begin; r < end; ++r) {
    const auto* h = call.h + r * 2 * F;
    auto* u = call.u + r * F;
    for_vectors<T, 1>(F, [&](int64_t i, int, auto at) PF_INLINE_LAMBDA {
      auto value = at.load(h + i), gate = at.load(h + F + i);
      if (bias != nullptr) {
        value += at.load(bias + i);
        gate += at.load(bias + F + i);
      }
      at.store(u + i, value * (gate * normal(gate).below));
    });
  }
}

// A strip of features of one row; all pointers are to its first element.
template <class D>
PF_INLINE void geglu_gradient(const GegluBackward<D>& call, int64_t row, int64_t first, int64_t count,
                              typename D::T* sums) {
  using T = typename D::T;
  const int64_t F = call.features;
  const auto *d_u = call.d_u + row * F + first, *h = call.h + row * 2 * F + first;
  const auto* bias = call.bias == nullptr ? nullptr : call.bias + first;
  auto *u = call.u + row * F + first, *d_h = call.d_h + row * 2 * F + first;
  for_vectors<T, 1>(count, [&](int64_t i, int, auto at) PF_INLINE_LAMBDA {
    auto value = at.load(h + i), gate = at.load(h + F + i);
    if (bias != nullptr) {
      value += at.load(bias + i);
      gate += at.load(bias + F + i);
    }
    const Normal<T> of = normal(gate);
    const auto d = at.load(d_u + i), gelu = gate * of.below;
    const auto d_value = d * gelu, d_gate = d * value * (of.below + gate * of.density);
    at.store(u + i, value * gelu);
    at.store(d_h + i, d_value);
    at.store(d_h + F + i, d_gate);
    if (sums != nullptr) {
      at.store(sums + i, at.load(sums + i) + d_value);
      at.store(sums + F + i, at.load(sums + F + i) + d_gate);
    }
  });
}

template <class D>
void geglu_gradient_rows(const GegluBackward<D>& call, int64_t begin, int64_t end, typename D::T* sums) {
  const FlushDenormals flush;
  const int64_t F = call.features, width = sums == nullptr ? F : kSumColumns;
  for (int64_t first = 0; first < F; first += width) {
    const int64_t count = F - first < width ? F - first : width;
    for (int64_t r = begin; r < end; ++r)
      geglu_gradient(call, r, first, count, sums == nullptr ? nullptr : sums + first);
  }
}

template <class D>
const GegluKernels<D>& geglu_table() {
  static constexpr GegluKernels<D> table{geglu_rows<D>, geglu_gradient_rows<D>};
  return table;
}

#define PF_INSTANTIATE(D) template const GegluKernels<D>& geglu_table<D>();
PF_FOR_DTYPES(PF_INSTANTIATE)

}  // namespace PF_ISA
}  // namespace perceiver_fast
