// Measures what this CPU can do at most, with threads of its own: multiply-adds and exponentials a second by loops of
// the instruction set in registers, copied bytes a second by memcpy between buffers that no cache holds. The best of
// several passes counts. Memory: kCopied bytes, or two buffers of kLeastCopied a thread where that is more.
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

namespace perceiver_fast {

namespace {

constexpr double kPassSeconds = 0.01;
constexpr int kPasses = 5, kTurns = 2;  // a turn measures all rates one after the other: a busy moment spoils only one
constexpr int64_t kCopied = int64_t(512) << 20;     // bytes of all buffers; less would fit into caches
constexpr int64_t kLeastCopied = int64_t(8) << 20;  // bytes of one buffer at least

volatile float sink;  // results are written here, so that the compiler cannot leave the loops out

struct Threads : std::vector<std::thread> {
  ~Threads() { join(); }  // also those that were started before one could not be
  void join() {
    for (auto& thread : *this)
      if (thread.joinable()) thread.join();
  }
};

// `body` must not throw.
double seconds_of(int threads, const std::function<void(int)>& body) {
  const auto start = std::chrono::steady_clock::now();
  Threads others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, t);
  body(0);
  others.join();
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
  const int64_t copied = std::max(kLeastCopied, kCopied / (2 * threads));
  std::vector<std::unique_ptr<char[]>> from(threads), to(threads);
  for (auto* buffers : {&from, &to})
    for (auto& buffer : *buffers) buffer.reset(new char[copied]);
  seconds_of(threads, [&](int t) {  // first touched where it will be copied
    std::memset(from[t].get(), 1, copied);
    std::memset(to[t].get(), 2, copied);
  });
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const double seconds = seconds_of(threads, [&](int t) {
      std::memcpy(to[t].get(), from[t].get(), copied);
      sink = to[t][pass];
    });
    best = std::max(best, 2.0 * copied * threads / seconds);
  }
  return best;
}

}  // namespace

Roofs measure_roofs(Isa isa, int threads) {
  if (threads < 1) throw std::invalid_argument("roofs: expected at least 1 thread, got " + std::to_string(threads));
  const auto& kernels = roofs_kernels<float>(isa);
  Roofs roofs{0, 0, 0};
  for (int turn = 0; turn < kTurns; ++turn) {
    roofs.multiply_adds =
        std::max(roofs.multiply_adds, rate(threads, kernels.multiply_adds_step, kernels.multiply_adds));
    roofs.exponentials = std::max(roofs.exponentials, rate(threads, kernels.exponentials_step, kernels.exponentials));
    roofs.copied_bytes = std::max(roofs.copied_bytes, copy_rate(threads));
  }
  return roofs;
}

}  // namespace perceiver_fast
