// See team.h. Threads that are known to share a processor are not called at all (cores.h); and where regions turn out to lose
// time, the caller works alone for a while (core/regions.h).
#include "team.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>

#include "../core/regions.h"
#include "cores.h"

namespace perceiver_fast {

namespace {

int64_t nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

}  // namespace

void run_shared(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  static thread_local Regions regions;
  const int64_t start = nanoseconds();
  if (n == 1 || regions.alone(start) || team_cores() == 1) return body(0, n);
  int64_t share_end = start;
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    body(begin, end);
    if (begin == 0) share_end = nanoseconds();  // the caller's own share is the first
  });
  const int64_t end = nanoseconds(), shares = std::min<int64_t>(n, torch::stable::get_num_threads());
  regions.add(end, end - start, share_end - start, shares);
}

}  // namespace perceiver_fast
