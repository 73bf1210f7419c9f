// Just enough of CUDA to run the kernels of csrc/cuda on the host, block after block, where there is no GPU.
//
// Every thread of a block is a fiber that runs until it reaches __syncthreads(). Between two barriers the threads run
// one after the other, upwards or downwards: a kernel that lacks a barrier computes something else in one of the two
// orders. A barrier that only some threads reach is an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx;

using std::max;
using std::min;

namespace emulation {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done;
};

inline ucontext_t scheduler;
inline Fiber* current;
inline const std::function<void()>* body;
inline bool downwards;

inline void enter() {
  (*body)();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

inline void run_block(int threads, const std::function<void()>& work) {
  static std::vector<Fiber> fibers(threads);
  body = &work;
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.done = false;
    makecontext(&fiber.context, enter, 0);
  }
  for (int finished = 0; finished < threads;) {
    const int before = finished;
    for (int i = 0; i < threads; ++i) {
      const int thread = downwards ? threads - 1 - i : i;
      current = &fibers[thread];
      threadIdx.x = thread;
      swapcontext(&scheduler, &current->context);
      finished += current->done;
    }
    if (finished != before && finished != threads) {
      std::fprintf(stderr, "emulation: %d threads wait at a barrier that others never reach\n", threads - finished);
      std::abort();
    }
  }
}

// Starts kernels as csrc/cuda/torch_stable.h does.
struct Launch {
  int threads;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, Arguments... arguments) const {
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
          run_block(threads, [&] { kernel(static_cast<Parameters>(arguments)...); });
  }
};

}  // namespace emulation

inline void __syncthreads() { swapcontext(&emulation::current->context, &emulation::scheduler); }
