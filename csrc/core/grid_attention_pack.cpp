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
  return {std::vector<T>(features + 1, inf), std::vector<T>(features + 1, -inf)};
}

template <class T>
void widen(TokenBounds<T>& bounds, int64_t at, T value) {
  bounds.low[at] = std::min(bounds.low[at], value);
  bounds.high[at] = std::max(bounds.high[at], value);
}

// One token's record. A masked token is all zero with a bias of -inf; if it holds a NaN or an infinity its bias is
// NaN: perceiver-pytorch multiplies it by a weight of zero, so there too it reaches every query.
template <class T>
void pack_token(const T* x, T r, int64_t features, bool masked, T* record) {
  T check = r * 0;
  record[0] = masked ? T(0) : r;
  for (int64_t f = 0; f < features; ++f) {
    check += x[f] * 0;
    record[1 + f] = masked ? T(0) : r * x[f];
  }
  record[1 + features] = masked ? check - std::numeric_limits<T>::infinity() : T(0);
}

}  // namespace

template <class T>
PackedTokens<T> pack_tokens(const GridAttentionInput<T>& in, int64_t tokens, const Parallel& parallel) {
  const int64_t B = in.batch, F = in.features;
  PackedTokens<T> packed;
  packed.data = Aligned<T>(B * tokens * (F + 2));
  packed.all_masked.assign(B, 0);
  packed.constant.assign(B, tokens == 1);
  if (in.mask != nullptr)
    for (int64_t b = 0; b < B; ++b) {
      const uint8_t* mask = in.mask + b * tokens;
      const int64_t visible = std::count_if(mask, mask + tokens, [](uint8_t m) { return m != 0; });
      packed.all_masked[b] = visible == 0;
      packed.constant[b] |= visible <= 1;
    }

  const int64_t chunks = (tokens + kTokenChunk - 1) / kTokenChunk;
  std::vector<TokenBounds<T>> partial(B * chunks, empty_bounds<T>(F));
  parallel.run(B * chunks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks, first = b * tokens + task % chunks * kTokenChunk;
      const int64_t last = std::min(first + kTokenChunk, (b + 1) * tokens);
      const bool use_mask = in.mask != nullptr && !packed.all_masked[b];
      TokenBounds<T>& bounds = partial[task];
      for (int64_t m = first; m < last; ++m) {
        T* record = packed.data.get() + m * (F + 2);
        pack_token(in.feat + m * F, in.scale[m], F, use_mask && !in.mask[m], record);
        for (int64_t f = 0; f <= F; ++f) widen(bounds, f, record[f]);
      }
    }
  });
  packed.bounds.assign(B, empty_bounds<T>(F));
  for (int64_t task = 0; task < B * chunks; ++task)
    for (int64_t f = 0; f <= F; ++f) {
      widen(packed.bounds[task / chunks], f, partial[task].low[f]);
      widen(packed.bounds[task / chunks], f, partial[task].high[f]);
    }
  return packed;
}

template <class T>
void pack_table(const T* rows, int64_t row_stride, int64_t count, int64_t length, int lanes, const T* factor,
                T* table) {
  for (int64_t l0 = 0; l0 < length; l0 += 16) {  // a cache line of every row at a time
    const int64_t l1 = std::min<int64_t>(l0 + 16, length);
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t l = l0; l < l1; ++l)
        table[l * lanes + lane] = lane < count ? factor[lane] * rows[lane * row_stride + l] : T(0);
  }
}

template <class T>
void unpack_table(const T* table, int64_t length, int lanes, const T* factor, int64_t count, T* rows,
                  int64_t row_stride) {
  for (int64_t l0 = 0; l0 < length; l0 += 16) {
    const int64_t l1 = std::min<int64_t>(l0 + 16, length);
    for (int64_t lane = 0; lane < count; ++lane)
      for (int64_t l = l0; l < l1; ++l) rows[lane * row_stride + l] = factor[lane] * table[l * lanes + lane];
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
    bound[lane] = std::max(axes[lane] * bounds.low[0], axes[lane] * bounds.high[0]);
    for (int64_t f = 0; f < features; ++f) {
      const T g = table[f * lanes + lane];
      bound[lane] += std::max(g * bounds.low[1 + f], g * bounds.high[1 + f]);
    }
  }
}

#define PF_INSTANTIATE(T)                                                                                           \
  template PackedTokens<T> pack_tokens<T>(const GridAttentionInput<T>&, int64_t, const Parallel&);                  \
  template void pack_table<T>(const T*, int64_t, int64_t, int64_t, int, const T*, T*);                              \
  template void unpack_table<T>(const T*, int64_t, int, const T*, int64_t, T*, int64_t);                            \
  template void bound_logits<T>(const T*, const std::vector<int64_t>&, int64_t, int, const TokenBounds<T>&, T*);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace perceiver_fast
