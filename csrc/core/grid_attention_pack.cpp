// Packing the tokens of grid attention, and bounds of its logits.
//
// Tokens are packed by chunks of kTokenChunk, which are shared out to the threads; every chunk finds the extremes of
// its tokens, and those of the chunks are joined in order. Memory: F + 2 numbers a token, and 2 F + 3 a chunk.
#include "grid_attention_pack.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace perceiver_fast {

namespace {

constexpr int64_t kTokenChunk = 8192;

template <class T>
TokenBounds<T> empty_bounds(int64_t features) {
  const T inf = std::numeric_limits<T>::infinity();
  return {std::vector<T>(features + 1, inf), std::vector<T>(features + 1, -inf), T(0)};
}

template <class T>
void widen(TokenBounds<T>& bounds, const TokenBounds<T>& part) {
  for (size_t f = 0; f < bounds.low.size(); ++f) {
    bounds.low[f] = std::min(bounds.low[f], part.low[f]);
    bounds.high[f] = std::max(bounds.high[f], part.high[f]);
  }
  bounds.square = std::max(bounds.square, part.square);
}

// A masked token is all zero with a bias of -inf. Returns whether it is finite.
template <class T>
bool pack_masked(const T* x, T r, int64_t features, T* record) {
  bool finite = std::isfinite(r);
  for (int64_t f = 0; f < features; ++f) finite &= std::isfinite(r * x[f]);
  std::fill(record, record + 1 + features, T(0));
  record[1 + features] = -std::numeric_limits<T>::infinity();
  return finite;
}

// Zeros in a record for what is not finite. Returns whether all is.
template <class T>
bool make_finite(int64_t features, T* record) {
  bool finite = true;
  for (int64_t f = 0; f <= features; ++f) {
    if (std::isfinite(record[f])) continue;
    finite = false;
    record[f] = 0;
  }
  return finite;
}

// Records of `count` tokens. FS > 0 fixes the number of features, so that the bounds stay in registers.
template <class T, int FS>
void pack_records(const T* feat, const T* scale, const uint8_t* mask, int64_t count, int64_t features, T* records,
                  TokenBounds<T>& bounds, std::vector<int64_t>& spoiled) {
  const int64_t F = FS > 0 ? FS : features;
  T low_local[FS + 1], high_local[FS + 1];
  T* low = FS > 0 ? low_local : bounds.low.data();
  T* high = FS > 0 ? high_local : bounds.high.data();
  if (FS > 0) {
    std::copy(bounds.low.begin(), bounds.low.end(), low);
    std::copy(bounds.high.begin(), bounds.high.end(), high);
  }
  T largest = bounds.square;
  for (int64_t m = 0; m < count; ++m, feat += F, records += F + 2) {
    if (mask != nullptr && !mask[m]) {
      if (!pack_masked(feat, scale[m], F, records)) spoiled.push_back(m);
      continue;  // no bound: its weight is zero whatever the queries
    }
    T square = 0;
    records[0] = scale[m];
    for (int64_t f = 0; f < F; ++f) {
      records[1 + f] = scale[m] * feat[f];
      square += records[1 + f] * records[1 + f];
    }
    records[1 + F] = 0;
    for (int64_t f = 0; f <= F; ++f) {
      low[f] = records[f] < low[f] ? records[f] : low[f];
      high[f] = records[f] > high[f] ? records[f] : high[f];
    }
    largest = square > largest ? square : largest;
  }
  if (FS > 0) {
    std::copy(low, low + F + 1, bounds.low.begin());
    std::copy(high, high + F + 1, bounds.high.begin());
  }
  bounds.square = largest;
}

}  // namespace

template <class T>
PackedTokens<T> pack_tokens(const GridAttentionInput<T>& in, int64_t tokens, const Parallel& parallel) {
  const int64_t B = in.batch / in.heads, F = in.features;
  PackedTokens<T> packed;
  packed.data = Aligned<T>(B * tokens * (F + 2));
  packed.all_masked.assign(B, 0);
  packed.constant.assign(B, tokens == 1);
  if (in.mask != nullptr)
    for (int64_t b = 0; b < B; ++b) {
      const uint8_t* mask = in.mask + b * tokens;
      const int64_t visible = std::count_if(mask, mask + tokens, [](uint8_t m) { return m != 0; });
      packed.all_masked[b] = visible == 0 && !in.inverted;  // inverted attention gives it no weight at all
      packed.constant[b] |= visible <= 1;
    }

  const int64_t chunks = (tokens + kTokenChunk - 1) / kTokenChunk;
  std::vector<TokenBounds<T>> partial(B * chunks, empty_bounds<T>(F));
  std::vector<std::vector<int64_t>> spoiled(B * chunks);
  const auto pack = F == 1   ? pack_records<T, 1>
                    : F == 2 ? pack_records<T, 2>
                    : F == 3 ? pack_records<T, 3>
                    : F == 4 ? pack_records<T, 4>
                             : pack_records<T, 0>;
  parallel.run(B * chunks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks, first = b * tokens + task % chunks * kTokenChunk;
      const int64_t count = std::min(kTokenChunk, (b + 1) * tokens - first);
      const bool use_mask = in.mask != nullptr && !packed.all_masked[b];
      pack(in.feat + first * F, in.scale + first, use_mask ? in.mask + first : nullptr, count, F,
           packed.data.get() + first * (F + 2), partial[task], spoiled[task]);
      for (int64_t m = 0; packed.all_masked[b] && m < count; ++m)
        if (!make_finite(F, packed.data.get() + (first + m) * (F + 2))) spoiled[task].push_back(m);
    }
  });
  packed.bounds.assign(B, empty_bounds<T>(F));
  for (int64_t task = 0; task < B * chunks; ++task) {
    const int64_t b = task / chunks;
    widen(packed.bounds[b], partial[task]);
    for (int64_t m : spoiled[task])
      packed.spoiled.push_back({b, task % chunks * kTokenChunk + m, packed.all_masked[b] ? 1 / double(tokens) : 0});
  }
  return packed;
}

template <class T>
void add_spoiled(const GridAttentionInput<T>& in, const PackedTokens<T>& packed, int64_t tokens, T* o) {
  const int64_t F = in.features, rows = in.heads * in.queries;  // of the queries that share tokens
  int64_t L = F;
  for (int64_t size : in.sizes) L += size;
  std::vector<T> added(L, T(0));
  for (size_t i = 0; i < packed.spoiled.size(); ++i) {
    const SpoiledToken token = packed.spoiled[i];
    const T* x = in.feat + (token.b * tokens + token.m) * F;
    const T weight = T(token.weight), r = in.scale[token.b * tokens + token.m];
    const auto add = [&](int64_t l, T value) {  // what is finite stands in the record, or has no weight
      if (!std::isfinite(value)) added[l] += weight * value;
    };
    for (int64_t f = 0; f < F; ++f) add(f, r * x[f]);
    int64_t end = L, rest = token.m;
    for (int64_t a = int64_t(in.sizes.size()) - 1; a >= 0; --a) {
      end -= in.sizes[a];
      add(end + rest % in.sizes[a], r);
      rest /= in.sizes[a];
    }
    if (i + 1 < packed.spoiled.size() && packed.spoiled[i + 1].b == token.b) continue;
    for (int64_t l = 0; l < L; ++l) {
      for (int64_t row = 0; added[l] != 0 && row < rows; ++row) o[(token.b * rows + row) * L + l] += added[l];
      added[l] = 0;
    }
  }
}

template <class T>
void bound_logits(const T* table, const std::vector<int64_t>& sizes, int64_t features, int lanes,
                  const TokenBounds<T>& bounds, T* bound) {
  std::vector<T> axis_max(lanes), axes(lanes, T(0));
  const T* row = table + features * lanes;
  for (int64_t size : sizes) {
    std::copy(row, row + lanes, axis_max.begin());
    for (int64_t i = 0; i < size; ++i, row += lanes)
      for (int lane = 0; lane < lanes; ++lane) axis_max[lane] = std::max(axis_max[lane], row[lane]);
    for (int lane = 0; lane < lanes; ++lane) axes[lane] += axis_max[lane];
  }
  for (int lane = 0; lane < lanes; ++lane) {
    // The channels' share is at most the sum of its terms' extremes, and at most |g| |r x|, which is the smaller bound
    // where channels are many.
    T extremes = 0, square = 0;
    for (int64_t f = 0; f < features; ++f) {
      const T g = table[f * lanes + lane];
      extremes += std::max(g * bounds.low[1 + f], g * bounds.high[1 + f]);
      square += g * g;
    }
    bound[lane] = std::max(axes[lane] * bounds.low[0], axes[lane] * bounds.high[0]) +
                  std::min(extremes, std::sqrt(square * bounds.square));
  }
}

#define PF_INSTANTIATE(T)                                                                                           \
  template PackedTokens<T> pack_tokens<T>(const GridAttentionInput<T>&, int64_t, const Parallel&);                  \
  template void add_spoiled<T>(const GridAttentionInput<T>&, const PackedTokens<T>&, int64_t, T*);                  \
  template void bound_logits<T>(const T*, const std::vector<int64_t>&, int64_t, int, const TokenBounds<T>&, T*);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace perceiver_fast
