// What the CUDA bindings share: torch's stable ABI, its current stream, and launches on it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <vector>

#include "tile.cuh"

namespace perceiver_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Starts kernels on one stream and reports a launch that failed.
struct Launch {
  cudaStream_t stream;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, Arguments... arguments) const {
    kernel<<<grid, kThreads, 0, stream>>>(static_cast<Parameters>(arguments)...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace perceiver_fast
