// What random calls of csrc/core's ops are made of.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/core/dtypes.h"
#include "../../csrc/core/parallel.h"

namespace {

using namespace perceiver_fast;

Parallel in_turn(int threads) {
  return {threads, [](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
            for (int64_t i = 0; i < n; ++i) body(i, i + 1);
          }};
}

Parallel at_once(int threads) {
  return {threads, [threads](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
            std::vector<std::thread> running;
            const int64_t each = (n + threads - 1) / threads;
            for (int64_t begin = 0; begin < n; begin += each)
              running.emplace_back([&, begin] { body(begin, std::min(n, begin + each)); });
            for (std::thread& thread : running) thread.join();
          }};
}

struct Generator {
  std::mt19937_64 bits;
  int64_t pick(std::initializer_list<int64_t> choices) { return choices.begin()[bits() % choices.size()]; }
  bool flip() { return bits() & 1; }
  double number() { return double(int64_t(bits()) >> 11) / double(int64_t(1) << 52); }  // in [-1, 1)
};

// On the heap, `count` elements and not one more.
template <class X>
class Array {
 public:
  explicit Array(int64_t count) : size_(count), memory_(new X[count > 0 ? count : 1]) {
    std::memset(static_cast<void*>(memory_.get()), 0xff, count * sizeof(X));
  }
  Array(int64_t count, Generator& random, double offset = 0) : Array(count) {
    for (int64_t i = 0; i < count; ++i) set(memory_[i], random.number() + offset);
  }
  X* data() const { return size_ > 0 ? memory_.get() : nullptr; }
  int64_t size() const { return size_; }

 private:
  static void set(BFloat16& to, double x) {
    const float value = float(x);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to.bits = uint16_t(bits >> 16);
  }
  template <class Y>
  static void set(Y& to, double x) {
    to = Y(x);
  }
  int64_t size_;
  std::shared_ptr<X[]> memory_;
};

// FNV-1a of the bytes of all arrays: whoever reads them all notices memory that is not there.
struct Digest {
  uint64_t value = 14695981039346656037u;
  template <class X>
  Digest& operator<<(const Array<X>& array) {
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(array.data());
    for (int64_t i = 0; i < array.size() * int64_t(sizeof(X)); ++i) value = (value ^ bytes[i]) * 1099511628211u;
    return *this;
  }
};

using Case = std::function<uint64_t(const Parallel&)>;

Array<uint8_t> mask_of(int64_t batch, int64_t tokens, bool used, Generator& random) {
  Array<uint8_t> mask(used ? batch * tokens : 0);
  for (int64_t i = 0; i < mask.size(); ++i) mask.data()[i] = i % tokens == 0 || random.flip();
  return mask;
}

}  // namespace
