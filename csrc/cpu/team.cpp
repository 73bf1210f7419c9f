// See team.h. Threads that are known to share a processor are not called at all (cores.h); and where regions turn out to lose
// time, the caller works alone for a while (core/regions.h).
#include "team.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
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
  const int64_t begun = nanoseconds(), alone = regions.alone(begun);
  int64_t done = 0;
  // In growing steps, since some bodies prepare what they need in every call.
  for (int64_t step = 1; done < n - 1 && alone > 0 && nanoseconds() < begun + alone; step *= 2) {
    const int64_t end = std::min(n, done + step);
    body(done, end);
    done = end;
  }
  if (n - done <= 1) return done == n ? void() : body(done, n);
  std::atomic<int64_t> work = 0;
  const int64_t start = nanoseconds();
  torch::stable::parallel_for(done, n, 1, [&](int64_t begin, int64_t end) {
    const int64_t before = worked();
    body(begin, end);
    work += worked() - before;
  });
  const int64_t end = nanoseconds();
  regions.add(end, end - start, work);
}

}  // namespace perceiver_fast
