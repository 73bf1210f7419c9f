// The tokens z_m = [feat_m ; for every axis: sin(pi f_k p) ; cos(pi f_k p) ; p] as the kernels see them: never stored,
// made channel by channel.
//
// The sums over channels do not care about their order, so kernels walk them in one of their own: first all bands, the
// sine and the cosine of a band side by side (they share the phase), then what needs no sine: features and positions.
// `v` is a channel's place in that order.
#pragma once

#include "sin_cos.h"

namespace perceiver_fast {

template <class T>
struct FourierTokens {
  const T* feat;              // [B, M, F]; null without features
  const double* coords;       // [Bc, M, A]
  const double* frequencies;  // [A, K]
  int64_t tokens;             // B M: token x = b M + m
  int64_t positions;          // Bc M: token x is at position x modulo this
  int features, axes, bands;  // F, A, K
  int pairs, channels;        // A K, and C = F + A (2 K + 1)
  uint32_t reciprocal;        // of K, see below

  FourierTokens(const T* feat_, const double* coords_, const double* frequencies_, int64_t tokens_, int64_t positions_,
                int features_, int axes_, int bands_)
      : feat(feat_), coords(coords_), frequencies(frequencies_), tokens(tokens_), positions(positions_),
        features(features_), axes(axes_), bands(bands_), pairs(axes_ * bands_),
        channels(features_ + axes_ * (2 * bands_ + 1)),
        reciprocal(bands_ ? uint32_t(((int64_t(1) << 31) + bands_ - 1) / bands_) : 0) {}

  // pair / K in two instructions; exact while A K^2 < 2^31, which the binding checks.
  __device__ int axis_of(int pair) const { return int(uint64_t(pair) * reciprocal >> 31); }

  // The row of the weight for place v.
  __device__ int channel(int v) const {
    const int pair = v / 2, single = v - 2 * pairs;
    if (single < 0) return features + pair + axis_of(pair) * (bands + 1) + (v % 2) * bands;
    return single < features ? single : features + (single - features) * (2 * bands + 1) + 2 * bands;
  }

  __device__ const double* position(int64_t x) const {
    return coords + (positions == tokens ? x : x % positions) * axes;
  }

  __device__ const T* features_of(int64_t x) const { return feat + x * features; }

  // A feature or a raw position: place 2 A K + single.
  __device__ T single(int single, const T* features_x, const double* position_x) const {
    return single < features ? features_x[single] : T(position_x[single - features]);
  }

  // What places v and v + 1 hold, for an even v; zero beyond the last channel.
  __device__ void encode(int v, const T* features_x, const double* position_x, T& first, T& second) const {
    if (v < 2 * pairs) {
      sin_cos_pi<T>(position_x[axis_of(v / 2)], frequencies[v / 2], first, second);
    } else {
      const int s = v - 2 * pairs, count = channels - 2 * pairs;
      first = s < count ? single(s, features_x, position_x) : T(0);
      second = s + 1 < count ? single(s + 1, features_x, position_x) : T(0);
    }
  }
};

}  // namespace perceiver_fast
