// When a caller that lost time in parallel regions works alone, and for how long.
#include "../../csrc/core/regions.h"

#include "check.h"

using perceiver_fast::Regions;

namespace {

constexpr int64_t kMillisecond = 1'000'000;

void regions_that_save_time() {
  Regions regions;
  for (int64_t now = 0; now < 1000 * kMillisecond; now += kMillisecond) {
    CHECK(!regions.alone(now), "after %d ms", int(now / kMillisecond));
    regions.add(now, 600'000, 500'000, 2);  // 0.6 ms where one thread had taken 1 ms
  }
}

void a_lost_millisecond() {
  Regions regions;
  regions.add(0, 900'000, 50'000, 2);
  CHECK(!regions.alone(1), "0.8 ms are not enough");
  regions.add(0, 500'000, 50'000, 2);
  CHECK(regions.alone(1), "1.2 ms are");
  CHECK(regions.alone(Regions::kFirstWhile - 1), "for the first while");
  CHECK(!regions.alone(Regions::kFirstWhile), "and no longer");
}

void what_is_saved_counts_too() {
  Regions regions;
  for (int i = 0; i < 100; ++i) {
    regions.add(0, 800'000, 50'000, 2);
    regions.add(0, 600'000, 700'000, 2);
  }
  CHECK(!regions.alone(1), "as much was saved as lost");
}

void tries() {
  Regions regions;
  int64_t now = 0, length = Regions::kFirstWhile;
  regions.add(now, 10 * kMillisecond, 1000, 2);
  for (int i = 0; i < 8; ++i) {
    CHECK(regions.alone(now + length - 1) && !regions.alone(now + length), "while %d", i);
    now += length;
    regions.add(now, kMillisecond, 1000, 2);  // a try that loses
    length = 2 * length < Regions::kLongestWhile ? 2 * length : Regions::kLongestWhile;
  }
  now += length;
  regions.add(now, 600'000, 500'000, 2);  // one that does not
  CHECK(!regions.alone(now), "threads are back");
  regions.add(now, 10 * kMillisecond, 1000, 2);
  CHECK(!regions.alone(now + Regions::kFirstWhile), "and the next while is short again");
}

}  // namespace

extern const Case regions_cases[] = {{"regions that save time", regions_that_save_time},
                                     {"a lost millisecond", a_lost_millisecond},
                                     {"what is saved counts, too", what_is_saved_counts_too},
                                     {"tries", tries},
                                     {nullptr, nullptr}};
