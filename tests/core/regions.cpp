// When a caller that lost time in parallel regions works alone, and for how long.
#include "../../csrc/core/regions.h"

#include "check.h"

using perceiver_fast::Regions;

namespace {

constexpr int64_t kMillisecond = 1'000'000;

void regions_that_save_time() {
  Regions regions;
  for (int64_t now = 0; now < 1000 * kMillisecond; now += kMillisecond) {
    CHECK(regions.alone(now) == 0, "after %d ms", int(now / kMillisecond));
    regions.add(now, 600'000, 2 * 500'000);  // 0.6 ms where one thread had taken 1 ms
  }
}

void a_lost_millisecond() {
  Regions regions;
  regions.add(0, 900'000, 2 * 50'000);
  CHECK(regions.alone(1) == 0, "0.8 ms are not enough");
  regions.add(0, 500'000, 2 * 50'000);
  CHECK(regions.alone(1) == 1'600'000, "1.2 ms are; alone for twice the larger loss");
  CHECK(regions.alone(Regions::kFirstWhile - 1) > 0, "for the first while");
  CHECK(regions.alone(Regions::kFirstWhile) == 0, "and no longer");
}

void what_is_saved_counts_too() {
  Regions regions;
  for (int i = 0; i < 100; ++i) {
    regions.add(0, 800'000, 2 * 50'000);
    regions.add(0, 600'000, 2 * 700'000);
  }
  CHECK(regions.alone(1) == 0, "as much was saved as lost");
}

void tries() {
  Regions regions;
  int64_t now = 0, length = Regions::kFirstWhile;
  regions.add(now, 10 * kMillisecond, 2 * 1000);
  for (int i = 0; i < 8; ++i) {
    CHECK(regions.alone(now + length - 1) > 0 && regions.alone(now + length) == 0, "while %d", i);
    now += length;
    regions.add(now, kMillisecond, 2 * 1000);  // a try that loses
    length = 2 * length < Regions::kLongestWhile ? 2 * length : Regions::kLongestWhile;
  }
  now += length;
  regions.add(now, 600'000, 2 * 500'000);  // one that does not
  CHECK(regions.alone(now) == 0, "threads are back");
  regions.add(now, 10 * kMillisecond, 2 * 1000);
  CHECK(regions.alone(now) > 0 && regions.alone(now + Regions::kFirstWhile) == 0, "and the next while is short again");
}

// Long work is handed to the others before a while is over; where they turn out to be there, the while ends.
void long_work() {
  Regions regions;
  regions.add(0, 3 * kMillisecond, 2 * 1000);
  CHECK(regions.alone(1) > 5 * kMillisecond && regions.alone(1) < 6 * kMillisecond, "twice what was lost");
  regions.add(7 * kMillisecond, 600'000, 2 * 500'000);
  CHECK(regions.alone(7 * kMillisecond) == 0, "the others are there");
}

}  // namespace

extern const Case regions_cases[] = {{"regions that save time", regions_that_save_time},
                                     {"a lost millisecond", a_lost_millisecond},
                                     {"what is saved counts, too", what_is_saved_counts_too},
                                     {"tries", tries},
                                     {"long work", long_work},
                                     {nullptr, nullptr}};
