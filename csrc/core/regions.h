// When parallel regions lose time, and the caller had better work alone.
//
// A region ends when all its threads have come to its end. A thread that waits for a processor, since other work has it,
// comes there at the system's next turn, some milliseconds later, however little there is to do. A region that took longer
// than its threads worked, all together, has lost time: the caller alone would have been faster. When a millisecond is lost,
// the caller works alone for a while, and then tries again; every try that loses doubles the while. Work that takes the
// caller longer than twice what a region has lost is handed to the others all the same.
#pragma once

#include <algorithm>
#include <cstdint>

namespace perceiver_fast {

// What one thread knows of the regions that it called. Times are in nanoseconds.
class Regions {
 public:
  static constexpr int64_t kMostLost = 1'000'000, kLosingTry = 200'000;
  static constexpr int64_t kFirstWhile = 20'000'000, kLongestWhile = 640'000'000;

  // For how long the caller works alone on what begins at this time; zero where it does not.
  int64_t alone(int64_t now) const { return now < until_ ? 2 * worst_ : 0; }

  // A region has ended at `now`. It took so long, and its threads worked so long, all together.
  void add(int64_t now, int64_t region, int64_t work) {
    const int64_t lost = region - work;  // less than nothing where threads saved time
    if (next_is_a_try_ && lost > kLosingTry) return rest(now, lost, std::min(2 * while_, kLongestWhile));
    if (next_is_a_try_) *this = Regions();
    lost_ += lost;
    if (lost_ <= 0) *this = Regions();
    worst_ = std::max(worst_, lost);
    if (lost_ > kMostLost) rest(now, worst_, kFirstWhile);
  }

 private:
  void rest(int64_t now, int64_t worst, int64_t length) {
    worst_ = worst;
    while_ = length;
    until_ = now + length;
    lost_ = 0;
    next_is_a_try_ = true;
  }

  // Since threads last saved more than was lost: what was lost in all, and by one region.
  int64_t lost_ = 0, worst_ = 0;
  int64_t while_ = kFirstWhile, until_ = 0;  // how long the caller works alone, and until when
  bool next_is_a_try_ = false;
};

}  // namespace perceiver_fast
