// The kernels of csrc/cuda/grid_attention.cu on the host, for ctypes.
#include "emulation.h"

#include "../../csrc/cuda/grid_attention_backward.cuh"
#include "../../csrc/cuda/grid_attention_forward.cuh"

using namespace perceiver_fast;

extern "C" void forward(const GridCall* call, int features, int float16, int downwards, float* columns, float* rows,
                        float* others) {
  emulation::downwards = downwards;
  grid_attention_forward(emulation::Launch{kThreads}, *call, features, float16, GridSums{columns, rows, others});
}

extern "C" void backward(const GridCall* call, int features, int float16, int downwards, const float* d_o,
                         const float* stats, float* columns, float* rows, float* others) {
  emulation::downwards = downwards;
  grid_attention_backward(emulation::Launch{kThreads}, *call, features, float16, GridGradients{d_o, stats},
                          GridSums{columns, rows, others});
}
