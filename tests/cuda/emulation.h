// Just enough of CUDA to run the kernels of csrc/cuda on the host, block after block, where there is no GPU.
//
// Every thread of a block is a fiber that runs until it reaches __syncthreads(). Between two barriers the threads run
// one after the other, upwards or downwards: a kernel that lacks a barrier computes something else in one of the two
// orders. A barrier that only some threads reach is an error. What warps do together, shuffles and products on tensor
// cores, are two such barriers: all warps of a block have to do as many.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __host__
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
inline int block_threads;

inline void enter() {
  (*body)();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

inline void run_block(int threads, const std::function<void()>& work) {
  static std::vector<Fiber> fibers(threads);
  body = &work;
  block_threads = threads;
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

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Byte n of the result is that of the two words which digit n of `which` says.
inline uint32_t __byte_perm(uint32_t first, uint32_t second, uint32_t which) {
  const uint64_t both = uint64_t(second) << 32 | first;
  uint32_t result = 0;
  for (int n = 0; n < 4; ++n) result |= uint32_t(both >> (which >> 4 * n & 7) * 8 & 0xff) << 8 * n;
  return result;
}

namespace emulation {

// Every thread's value, where all can read it: `read` is called once all are there, and before any is replaced.
template <class T, class Read>
auto exchanged(const T& value, const Read& read) {
  static T values[1024];
  values[threadIdx.x] = value;
  __syncthreads();
  const auto result = read(values);
  __syncthreads();
  return result;
}

inline uint32_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float flushed(float x) { return x < 0x1p-126f ? 0.0f : x; }

// A float16 has no more digits than a float32, and no smaller or larger exponents.
inline float from_float16(uint32_t bits) {
  const uint32_t exponent = bits >> 10 & 31, digits = bits & 1023;
  const float size = exponent == 31 ? (digits ? NAN : INFINITY)
                     : exponent     ? std::ldexp(float(digits + 1024), int(exponent) - 25)
                                    : std::ldexp(float(digits), -24);
  return bits & 0x8000 ? -size : size;
}

// What a lane has of a product, and of all lanes what it needs. csrc/cuda/tensor_core.cuh says which lane holds what: `a` and
// `b` find a number of a row or column in a lane's words. Sums are in float32, in order: how GPUs round is not emulated.
template <class A, class B>
void product(float (&d)[4], const uint32_t (&words)[4], uint32_t b0, uint32_t b1, const float (&c)[4], int terms,
             const A& a, const B& b) {
  struct Lane {
    uint32_t a[4], b[2];
  };
  struct Four {
    float at[4];
  };
  const Lane mine{{words[0], words[1], words[2], words[3]}, {b0, b1}};
  const int lane = threadIdx.x % 32, warp = threadIdx.x - lane;
  const Four sums = exchanged(mine, [&](const Lane* lanes) {
    Four out;
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4, upper = e / 2, column = lane % 4 * 2 + e % 2;
      float sum = c[e];
      for (int k = 0; k < terms; ++k) sum += a(lanes + warp + 4 * row, upper, k) * b(lanes + warp + 4 * column, k);
      out.at[e] = sum;
    }
    return out;
  });
  for (int e = 0; e < 4; ++e) d[e] = sums.at[e];
}

inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  const auto half = [](uint32_t word, int k) { return __uint_as_float(k % 2 ? word & 0xffff0000u : word << 16); };
  product(
      d, a, b0, b1, c, 16,
      [&](const auto* row, int upper, int k) { return half(row[k % 8 / 2].a[k / 8 * 2 + upper], k); },
      [&](const auto* column, int k) { return half(column[k % 8 / 2].b[k / 8], k); });
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  const auto number = [](uint32_t word) {
    if (word & 0x1fff) {
      std::fprintf(stderr, "emulation: %08x is not TF32\n", word);
      std::abort();
    }
    return __uint_as_float(word);
  };
  product(
      d, a, b0, b1, c, 8, [&](const auto* row, int upper, int k) { return number(row[k % 4].a[k / 4 * 2 + upper]); },
      [&](const auto* column, int k) { return number(column[k % 4].b[k / 4]); });
}

}  // namespace emulation

inline float __shfl_sync(uint32_t, float x, int lane) {
  const int warp = threadIdx.x / 32 * 32;
  return emulation::exchanged(x, [&](const float* values) { return values[warp + lane % 32]; });
}

inline float __shfl_xor_sync(uint32_t all, float x, int mask) { return __shfl_sync(all, x, threadIdx.x % 32 ^ mask); }

inline bool __syncthreads_or(bool x) {
  return emulation::exchanged(x, [](const bool* values) {
    return std::any_of(values, values + emulation::block_threads, [](bool value) { return value; });
  });
}
