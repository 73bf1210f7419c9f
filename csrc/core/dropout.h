// Which attention weights dropout drops: a pure function of the seed and of the weight's indices, so that the same
// seed drops the same weights however the work is tiled or split over threads, and nothing is stored for the backward.
//
// A query and a token have a 32-bit hash each, of their index and the seed; a weight has the hash of these two.
// perceiver_fast/reference/dropout.py states the same.
#pragma once

#include <cstdint>

namespace perceiver_fast {

// Sebastiano Vigna's splitmix64: a bijection whose every output bit depends on every input bit.
inline uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

template <class T>
struct HashLane;  // an integer as wide as T, to hold a hash in a vector's lane
template <>
struct HashLane<float> {
  using type = uint32_t;
};
template <>
struct HashLane<double> {
  using type = uint64_t;
};

struct Dropout {
  uint32_t threshold;  // a weight is dropped when its hash is below; zero: no dropout
  uint64_t seed;
  int64_t first;  // index of the first token that is given among all tokens, which may be a part of these

  Dropout(double probability, uint64_t seed_, int64_t first_ = 0)
      : threshold(uint32_t(probability * 4294967296.0 < 4294967295.0 ? probability * 4294967296.0 : 4294967295.0)),
        seed(splitmix64(seed_)),
        first(first_) {}
  explicit operator bool() const { return threshold != 0; }
  // What kept weights are multiplied by: the exact inverse of the share that is kept.
  double scale() const { return 4294967296.0 / (4294967296.0 - double(threshold)); }
  // Hashes of a query, by its index over batch, heads and queries, and of a token.
  uint32_t query_hash(int64_t row) const { return uint32_t(splitmix64(seed ^ splitmix64(2 * uint64_t(row))) >> 32); }
  uint32_t token_hash(int64_t token) const {
    return uint32_t(splitmix64(seed ^ splitmix64(2 * uint64_t(first + token) + 1)) >> 32);
  }
};

}  // namespace perceiver_fast
