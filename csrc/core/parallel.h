// How a caller runs work in parallel, so that core needs no thread pool of its own: the bindings pass torch's threads.
#pragma once

#include <cstdint>
#include <functional>

namespace perceiver_fast {

// `run(n, body)` calls body(begin, end) on disjoint ranges that cover [0, n).
struct Parallel {
  int threads;
  std::function<void(int64_t n, const std::function<void(int64_t, int64_t)>& body)> run;
};

}  // namespace perceiver_fast
