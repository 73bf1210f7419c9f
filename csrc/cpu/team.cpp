// See team.h.
//
// A parallel region ends when all its threads have come to its end. Where one of them waits for a processor, since it shares
// the caller's or other processes keep the others busy, that takes until the system's next turn, some milliseconds, however
// little there is to do. Two things keep that from every region: threads that are known to share a processor
// (cores.h) are not called at all; and regions are timed. One that took longer than all shares one after the other would have
// has lost time. When a millisecond is lost, the caller works alone for a while, then tries again; each try that loses, too,
// doubles the while.
#include "team.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>

#include "cores.h"

namespace perceiver_fast {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::duration_cast;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;

constexpr nanoseconds kMostLost = milliseconds(1);
constexpr nanoseconds kLostTry = microseconds(200);
constexpr nanoseconds kFirstWhile = milliseconds(20), kLongestWhile = milliseconds(640);

// What a calling thread knows of its regions.
class Regions {
 public:
  bool works_alone(Clock::time_point now) const { return now < until_; }

  // `share` is how long the caller took for its own share of so many.
  void add(Clock::time_point end, nanoseconds region, nanoseconds share, int64_t shares) {
    const nanoseconds loss = region - share * shares;
    if (trying_) {
      trying_ = false;
      if (loss > kLostTry) return rest(end, std::min(2 * while_, kLongestWhile));
    }
    lost_ = std::max(nanoseconds(0), lost_ + loss);
    if (lost_ > kMostLost) rest(end, kFirstWhile);
  }

 private:
  void rest(Clock::time_point end, nanoseconds length) {
    while_ = length;
    until_ = end + length;
    lost_ = nanoseconds(0);
    trying_ = true;
  }

  nanoseconds lost_{0}, while_ = kFirstWhile;
  Clock::time_point until_{};
  bool trying_ = false;
};

}  // namespace

void run_shared(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  static thread_local Regions regions;
  const Clock::time_point start = Clock::now();
  if (n == 1 || regions.works_alone(start) || team_cores() == 1) return body(0, n);
  Clock::time_point share_end = start;
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    body(begin, end);
    if (begin == 0) share_end = Clock::now();  // the caller's own share is the first
  });
  const Clock::time_point end = Clock::now();
  const int64_t shares = std::min<int64_t>(n, torch::stable::get_num_threads());
  regions.add(end, end - start, share_end - start, shares);
}

}  // namespace perceiver_fast
