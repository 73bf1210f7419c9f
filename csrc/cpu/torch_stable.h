// What the bindings share: torch's stable ABI, and torch's intra-op threads as core's Parallel.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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

// [A, B, C, D] on the CPU that lies in memory as [A, C, B, D]. It is no view of another tensor: whoever gets it may write to it.
inline Tensor empty_middle_swapped(const std::vector<int64_t>& sizes, ScalarType dtype) {
  const int64_t strides[] = {sizes[2] * sizes[1] * sizes[3], sizes[3], sizes[1] * sizes[3], 1};
  const int32_t code = dtype == ScalarType::Double     ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float32();
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes.data(), strides, code, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
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
