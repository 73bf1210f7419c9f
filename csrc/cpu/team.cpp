// See team.h. Threads that are known to share a processor are not called at all (cores.h); and where regions turn out to lose
// time, the caller works alone for a while (core/regions.h).
#include "team.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <ctime>

#include "../core/regions.h"
#include "cores.h"

namespace perceiver_fast {

namespace {

int64_t nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

// How long the calling thread has worked; how long it waited for a processor does not count.
int64_t worked() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec time;
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) return int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
#endif
  return nanoseconds();
}

}  // namespace

void run_shared(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  if (n == 1 || team_cores() == 1) return body(0, n);
  static thread_local Regions regions;
  const int64_t threads = torch::stable::get_num_threads(), begun = nanoseconds();
  int64_t done = 0;
  if (const int64_t alone = regions.alone(begun); alone > 0) {
    const int64_t step = std::max<int64_t>(1, n / (4 * threads));
    while (done < n && nanoseconds() < begun + alone) {
      body(done, std::min(n, done + step));
      done = std::min(n, done + step);
    }
    if (done == n) return;
  }
  const int64_t start = nanoseconds(), worked_before = worked();
  int64_t share = 0;
  torch::stable::parallel_for(done, n, 1, [&](int64_t begin, int64_t end) {
    body(begin, end);
    if (begin == done) share = worked() - worked_before;  // the first one is the caller's
  });
  const int64_t end = nanoseconds();
  regions.add(end, end - start, share, std::min(n - done, threads));
}

}  // namespace perceiver_fast
