// What the tests of csrc/core share: cases, checks, numbers, and arrays that notice who leaves them.
//
// Files that are compiled for an instruction set use no template or inline function of the standard library, as the
// kernels do: the linker keeps one copy of those, and it may be one that this CPU cannot run.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../csrc/core/dtypes.h"

struct Case {
  const char* name;
  void (*run)();
};

extern int failures;  // in main.cpp

// CHECK(condition, "what was tested: %d", n): a line and a count for what fails, and the test goes on.
#define CHECK(condition, ...)                                \
  do {                                                       \
    if (!(condition)) {                                      \
      printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      printf(__VA_ARGS__);                                   \
      printf("\n");                                          \
      ++failures;                                            \
    }                                                        \
  } while (0)

namespace {

// `count` elements before memory that can be neither read nor written, `gap` bytes in between. They start as NaN (all
// bits set), the bytes around them as kGuard; the destructor says who changed those.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count, int64_t gap = 0) : count_(count), gap_(gap) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    size_ = (count * int64_t(sizeof(T)) + gap + 64 + page - 1) / page * page;
    memory_ = static_cast<unsigned char*>(
        mmap(nullptr, size_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory_ + size_, page, PROT_NONE);
    memset(memory_, kGuard, size_);
    memset(static_cast<void*>(data()), 0xff, count * sizeof(T));
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    int64_t changed = 0;
    for (int64_t i = 0; i < size_; ++i) changed += (i < start() || i >= size_ - gap_) && memory_[i] != kGuard;
    CHECK(changed == 0, "%lld bytes around an array of %lld were written", (long long)changed, (long long)count_);
    munmap(memory_, size_ + sysconf(_SC_PAGESIZE));
  }

  T* data() const { return reinterpret_cast<T*>(memory_ + start()); }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }

 private:
  static constexpr unsigned char kGuard = 0xa5;
  int64_t start() const { return size_ - gap_ - count_ * int64_t(sizeof(T)); }
  int64_t count_, gap_, size_;
  unsigned char* memory_;
};

// Numbers in [-1, 1), the same in every run.
struct Random {
  uint64_t state = 1;
  double operator()() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return double(int64_t(state) >> 11) / (int64_t(1) << 52);
  }
  int small() { return int((*this)() * 5); }  // -4 to 4: sums of their products are exact in a float
};

// Chris Wellons' lowbias32, which dropout mixes two hashes with.
inline uint32_t lowbias32(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

inline float value_of(float x) { return x; }
inline double value_of(double x) { return x; }
inline float value_of(perceiver_fast::BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The largest of many errors, held against the bound that the tested function's comment states.
struct Largest {
  double error = 0, at = 0;
  void add(double new_error, double where) {
    if (!(new_error <= error)) error = new_error, at = where;  // NaN, too
  }
  void check(const char* what, double bound) const {
    printf("  %s: %.3g at %.9g (stated: %.3g)\n", what, error, at, bound);
    CHECK(error <= bound, "%s", what);
  }
};

}  // namespace
