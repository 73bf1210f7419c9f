// What the bindings share: torch's stable ABI, and torch's intra-op threads as core's Parallel.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../core/parallel.h"

namespace perceiver_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Parallel torch_parallel() {
  return {int(torch::stable::get_num_threads()),
          [](int64_t n, const auto& body) { torch::stable::parallel_for(0, n, 1, body); }};
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

}  // namespace perceiver_fast
