// What the bindings share: torch's stable ABI, and torch's intra-op threads as core's Parallel.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../core/dropout.h"
#include "../core/parallel.h"

namespace perceiver_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Parallel torch_parallel() {
  return {int(torch::stable::get_num_threads()),
          [](int64_t n, const auto& body) { torch::stable::parallel_for(0, n, 1, body); }};
}

// A dropout probability with the seed that decides what is dropped.
inline Dropout dropout_of(double probability, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(probability >= 0 && probability < 1, "expected a dropout probability in [0, 1), got ", probability);
  if (probability == 0) return Dropout(0, 0);
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "expected a seed of one int64 with dropout");
  return Dropout(probability, uint64_t(*static_cast<const int64_t*>(seed->data_ptr())));
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

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
