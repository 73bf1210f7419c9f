#include "roofs.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernel_tables.h"

namespace perceiver_fast {

template <class T>
const RoofsKernels<T>& roofs_kernels(Isa isa);
PF_KERNEL_TABLE(RoofsKernels, roofs, float, f32)

namespace {

constexpr double kPassSeconds = 0.01;
constexpr int kPasses = 8;
constexpr int64_t kCopied = int64_t(64) << 20;  // more than a core's share of any cache

volatile float sink;  // keeps what the loops compute

double seconds_of(int threads, const std::function<void(int)>& body) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, t);
  body(0);
  for (auto& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Operations a second of `threads` threads, the best of some passes; the first finds how long a pass has to be.
double rate(int threads, int64_t step, const std::function<float(int64_t)>& loop) {
  int64_t rounds = 1000;
  double best = 0;
  for (int pass = 0; pass < kPasses;) {
    const double seconds = seconds_of(threads, [&](int) { sink = loop(rounds); });
    if (seconds < kPassSeconds) {
      rounds *= 2;
      continue;
    }
    best = std::max(best, double(step) * rounds * threads / seconds);
    ++pass;
  }
  return best;
}

double copy_rate(int threads) {
  std::vector<std::unique_ptr<char[]>> from(threads), to(threads);
  const auto prepare = [&](int t) {  // where the thread is that will copy
    from[t].reset(new char[kCopied]);
    to[t].reset(new char[kCopied]);
    std::memset(from[t].get(), 1, kCopied);
    std::memset(to[t].get(), 2, kCopied);
  };
  seconds_of(threads, prepare);
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const double seconds = seconds_of(threads, [&](int t) {
      std::memcpy(to[t].get(), from[t].get(), kCopied);
      sink = to[t][pass];
    });
    best = std::max(best, 2.0 * kCopied * threads / seconds);
  }
  return best;
}

}  // namespace

Roofs measure_roofs(Isa isa, int threads) {
  if (threads < 1) throw std::invalid_argument("roofs: expected at least 1 thread, got " + std::to_string(threads));
  const auto& kernels = roofs_kernels<float>(isa);
  Roofs roofs;
  roofs.multiply_adds = rate(threads, kernels.multiply_adds_step, kernels.multiply_adds);
  roofs.exponentials = rate(threads, kernels.exponentials_step, kernels.exponentials);
  roofs.copied_bytes = copy_rate(threads);
  return roofs;
}

}  // namespace perceiver_fast
