// The forward of grid_query_attention for one instruction set. A strip's shift, an integer, is added to all
// exponents; it changes where the weights would leave the range, and the sums so far are scaled to match.
#pragma once

#include "grid_query_attention_strips.h"

namespace perceiver_fast {
namespace PF_ISA {

// Weights stay below e^kShiftRange, and the largest one above e^-kShiftRange.
template <class T>
constexpr T kShiftRange = sizeof(T) == 8 ? 150 : 15;

// A strip's sums: [C][width], then its totals and shifts.
template <class T>
struct StripSums {
  T *out, *total, *shift;
};
template <class T>
PF_INLINE StripSums<T> sums_of(T* state, int64_t s, int64_t channels) {
  T* out = state + s * (channels + 2) * kStrip<T>;
  return {out, out + channels * kStrip<T>, out + (channels + 1) * kStrip<T>};
}

template <class T, Source From>
PF_INLINE void block_maximum(const StripKeys<T>& k, T* largest) {
  using S = Simd<T>;
  typename S::Vec r[kStripVectors], top[kStripVectors];
  for (int u = 0; u < kStripVectors; ++u) {
    r[u] = S::load(k.r + u * S::lanes);
    top[u] = S::set(-__builtin_inff());
  }
  for (int64_t n = 0; n < k.count; ++n)
    for (int u = 0; u < kStripVectors; ++u) top[u] = S::max(logit<T, From>(k, n, u * S::lanes, r[u]), top[u]);
  for (int u = 0; u < kStripVectors; ++u) S::store(largest + u * S::lanes, top[u]);
}

template <class T>
void fit_shift(int64_t channels, const StripSums<T>& sums, const T* largest) {
  using S = Simd<T>;
  alignas(64) T factor[kStrip<T>];
  bool any = false;
  for (int64_t lane = 0; lane < kStrip<T>; ++lane) {
    const T old = sums.shift[lane], top = largest[lane] + old, total = sums.total[lane];
    const bool move = top > kShiftRange<T> || (total == 0 && top < -kShiftRange<T> && top - top == 0);
    if (move) sums.shift[lane] = T(-__builtin_nearbyint(double(largest[lane])));
    factor[lane] = T(__builtin_exp(double(total == 0 ? T(0) : sums.shift[lane] - old)));  // one where nothing moves
    any |= move;
  }
  if (!any) return;
  for (int64_t v = 0; v < kStrip<T>; v += S::lanes) {
    const auto scale = S::load(factor + v);
    S::store(sums.total + v, S::load(sums.total + v) * scale);
    for (int64_t c = 0; c < channels; ++c) {
      T* at = sums.out + c * kStrip<T> + v;
      S::store(at, S::load(at) * scale);
    }
  }
}

// Adds the keys' weights and, of C channels, weighted values. Not shifted are logits by axes alone.
template <class T, Source From, bool Shifted, int C>
void sum_few(const StripKeys<T>& k, const T* v, const StripSums<T>& sums) {
  using S = Simd<T>;
  using V = typename S::Vec;
  V r[kStripVectors], shift[kStripVectors], total[kStripVectors] = {}, out[C][kStripVectors] = {};
  for (int u = 0; u < kStripVectors; ++u) {
    r[u] = S::load(k.r + u * S::lanes) * (Shifted ? T(1) : T(kLog2E));
    shift[u] = S::load(sums.shift + u * S::lanes);
  }
  for (int64_t n = 0; n < k.count; ++n)
    for (int u = 0; u < kStripVectors; ++u) {
      const int v_at = u * S::lanes;
      const V p = Shifted ? weight<T, From>(k, n, v_at, r[u], shift[u])
                          : exp2_within<T>(fma(r[u], axes_part(k, n, v_at), S::set(k.bias_log2[n])));
      total[u] += p;
      for (int c = 0; c < C; ++c) out[c][u] = fma(p, S::set(v[n * C + c]), out[c][u]);
    }
  for (int u = 0; u < kStripVectors; ++u) {
    T* at = sums.total + u * S::lanes;
    S::store(at, S::load(at) + total[u]);
    for (int c = 0; c < C; ++c) {
      at = sums.out + c * kStrip<T> + u * S::lanes;
      S::store(at, S::load(at) + out[c][u]);
    }
  }
}

// Adds the keys' weights and leaves them in the tile, without those that are dropped.
template <class T, Source From, bool Dropped>
void weigh(const StripKeys<T>& k, const QueryKeys<T>& keys, int64_t begin, const QueryForward<T>& f,
           const typename HashLane<T>::type* hashes, const StripSums<T>& sums) {
  using S = Simd<T>;
  using V = typename S::Vec;
  V r[kStripVectors], shift[kStripVectors], total[kStripVectors] = {};
  for (int u = 0; u < kStripVectors; ++u) {
    r[u] = S::load(k.r + u * S::lanes);
    shift[u] = S::load(sums.shift + u * S::lanes);
  }
  for (int64_t n = 0; n < k.count; ++n)
    for (int u = 0; u < kStripVectors; ++u) {
      V p = weight<T, From>(k, n, u * S::lanes, r[u], shift[u]);
      total[u] += p;
      if (Dropped) p = keep<T>(p, hashes + u * S::lanes, keys.hashes[begin + n], f.threshold);
      S::store(k.tile + n * kStrip<T> + u * S::lanes, p);
    }
  for (int u = 0; u < kStripVectors; ++u) {
    T* at = sums.total + u * S::lanes;
    S::store(at, S::load(at) + total[u]);
  }
}

template <class T, Source From, bool Shifted>
PF_INLINE void sum_any_few(int64_t channels, const StripKeys<T>& k, const T* v, const StripSums<T>& sums) {
  switch (channels) {
    case 1: return sum_few<T, From, Shifted, 1>(k, v, sums);
    case 2: return sum_few<T, From, Shifted, 2>(k, v, sums);
    case 3: return sum_few<T, From, Shifted, 3>(k, v, sums);
    default: return sum_few<T, From, Shifted, 4>(k, v, sums);
  }
}

// Whether no exponent of the strip can leave the range in which none needs a shift. `x` [F][width] are its scaled
// channels: their product with a key's is at most the product of lengths.
template <class T>
bool needs_no_shift(const QueryRows<T>& rows, const QueryKeys<T>& keys, const T* r, const T* x) {
  using S = Simd<T>;
  alignas(64) T square[kStrip<T>];
  for (int64_t v = 0; v < kStrip<T>; v += S::lanes) {
    typename S::Vec sum{};
    for (int64_t f = 0; f < rows.features; ++f) {
      const auto value = S::load(x + f * kStrip<T> + v);
      sum = fma(value, value, sum);
    }
    S::store(square + v, sum);
  }
  bool safe = true;
  for (int64_t lane = 0; lane < kStrip<T>; ++lane)
    safe &= __builtin_sqrt(double(square[lane])) * double(keys.feat_bound) +
                __builtin_fabs(double(r[lane])) * double(keys.axes_bound) + double(keys.bias_bound) <=
            double(kSafeExponent<T>) * kLn2;
  return safe;
}

// Divides a strip's sums by its totals and writes them out.
template <class T>
void write(const QueryForward<T>& f, const StripPlace& at, const StripSums<T>& sums, T* rows) {
  using S = Simd<T>;
  const int64_t W = kStrip<T>, C = f.channels;
  if (f.lse != nullptr)
    for (int64_t lane = 0; lane < at.count; ++lane)
      f.lse[at.first + lane] = __builtin_log(double(sums.total[lane])) - double(sums.shift[lane]);
  for (int64_t v = 0; v < W; v += S::lanes) {
    const auto factor = S::set(f.keep_scale) / S::load(sums.total + v);
    for (int64_t c = 0; c < C; ++c) S::store(sums.out + c * W + v, S::load(sums.out + c * W + v) * factor);
  }
  T* o = f.o + at.first * f.query_stride;
  if (!f.add) return transpose(C, at.count, sums.out, W, o, f.query_stride);
  transpose(C, at.count, sums.out, W, rows, C);
  for (int64_t lane = 0; lane < at.count; ++lane)
    for (int64_t c = 0; c < C; ++c) o[lane * f.query_stride + c] += rows[lane * C + c];
}

// A tile for every strip, the sums of a row's outer axes, every strip's sums, and rows to write.
template <class T>
int64_t forward_scratch(int64_t strips, int64_t features, int64_t channels) {
  return (strips * (kBlockKeys + kGemmRows + channels + 2) + channels) * kStrip<T> + kBlockKeys + kGemmRows;
}

template <class T, Source From>
void forward_from(const QueryRows<T>& rows, const QueryKeys<T>& keys, const QueryGroup<T>& group,
                  const QueryForward<T>& f) {
  const int64_t W = kStrip<T>, C = f.channels, N = keys.count, each = block_keys(N);
  const bool few = keys.panels == nullptr;
  T *tiles = f.scratch, *state = tiles + group.count * each * W, *written = state + group.count * (C + 2) * W,
    *row = written + C * W;
  for (int64_t i = 0; i < group.count * (C + 2) * W; ++i) state[i] = 0;
  for (int64_t begin = 0; begin < N; begin += each) {
    const int64_t count = N - begin < each ? N - begin : each;
    for (int64_t s = 0; s < group.count; ++s) {
      const StripSums<T> sums = sums_of(state, s, C);
      const StripKeys<T> k = strip_keys(rows, keys, group, s, begin, count, row, tiles + s * each * W);
      const bool safe = needs_no_shift(rows, keys, k.r, group.x + s * rows.features * W);
      if (!safe) {
        alignas(64) T largest[kStrip<T>];
        block_maximum<T, From>(k, largest);
        fit_shift(C, sums, largest);
      }
      const auto* hashes = f.hashes + (f.threshold != 0 ? s * W : 0);
      // With channels a shift of zero is added all the same: no query's bits depend on another in its strip.
      if (few && (From != Source::axes || !safe)) sum_any_few<T, From, true>(C, k, keys.v + begin * C, sums);
      else if (few) sum_any_few<T, Source::axes, false>(C, k, keys.v + begin * C, sums);
      else if (f.threshold != 0) weigh<T, From, true>(k, keys, begin, f, hashes, sums);
      else weigh<T, From, false>(k, keys, begin, f, hashes, sums);
    }
    for (int64_t c = 0; !few && c < C; c += kPanel) {
      const T* panel = keys.panels + (c / kPanel * N + begin) * kPanel;
      for (int64_t s = 0; s < group.count; ++s)
        tile_gemm<T, true>(C - c < kPanel ? C - c : kPanel, W, count, panel, 1, kPanel, tiles + s * each * W, W,
                           sums_of(state, s, C).out + c * W, W);
    }
  }
  for (int64_t s = 0; s < group.count; ++s)
    write(f, place_of(rows, group.first + s), sums_of(state, s, C), written);
}

template <class T>
void forward(const QueryRows<T>& rows, const QueryKeys<T>& keys, const QueryGroup<T>& group,
             const QueryForward<T>& f) {
  const FlushDenormals flush;
  with_source(rows, [&](auto source) { forward_from<T, decltype(source)::from>(rows, keys, group, f); });
}

}  // namespace PF_ISA
}  // namespace perceiver_fast
