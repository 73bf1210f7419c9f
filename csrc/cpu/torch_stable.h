// What the bindings share: torch's stable ABI, and torch's intra-op threads as core's Parallel.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../core/dropout.h"
#include "../core/parallel.h"
#include "team.h"

namespace perceiver_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Parallel torch_parallel() { return {int(torch::stable::get_num_threads()), run_shared}; }

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// The same numbers without gaps. Asking first saves a call through torch's dispatcher, which takes as long as a small op.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The first element; null for a tensor that is not there.
template <class X>
X* data(const Tensor& t) {
  return static_cast<X*>(t.data_ptr());
}
template <class X>
X* data(const std::optional<Tensor>& t) {
  return t ? data<X>(*t) : nullptr;
}

// Calls run with a zero of a tensor's type, float or double; that it is one of the two has been checked before.
template <class Run>
void with_type(const Tensor& t, const Run& run) {
  if (t.scalar_type() == ScalarType::Double)
    run(0.0);
  else
    run(0.0f);
}

}  // namespace perceiver_fast
