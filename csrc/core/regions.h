// When parallel regions lose time, and the caller had better work alone.
//
// A region ends when all its threads have come to its end. A thread that waits for a processor, since other work has it,
// comes there at the system's next turn, some milliseconds later, however little there is to do. A region that took longer
// than all its shares one after the other has lost time. When a millisecond is lost, the caller works alone for a while, and
// then tries again; every try that loses doubles the while. Work that takes the caller longer than regions have lost is
// handed to the others all the same.
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

  // A region has ended at `now`. It took so long, and the caller worked so long on its own share, one of so many.
  void add(int64_t now, int64_t region, int64_t share, int64_t shares) {
    const int64_t lost = region - share * shares;  // less than nothing where threads saved time
    if (tries_ && lost > kLosingTry) return rest(now, lost, std::min(2 * while_, kLongestWhile));
    if (tries_) *this = Regions();
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
    tries_ = true;
  }

  int64_t lost_ = 0, worst_ = 0;  // in all, and by one region
  int64_t while_ = kFirstWhile, until_ = 0;
  bool tries_ = false;  // whether the next region is the first after working alone
};

}  // namespace perceiver_fast
