// The inner loops of streaming attention in bfloat16, for CPUs whose instructions multiply pairs of it (pairs.h): logits,
// exponentials and all sums are float. cross_attention_block.h says what a tile and a block are.
//
// Weights are rounded to bfloat16 before anything is done with them, in the forward and in the backward: shifts are
// integers, so that both round to the same numbers, and the weights of a query, whose total is of rounded ones, add up to
// one. A gradient of a constant stays zero.
#include "cross_attention_pairs.h"
#include "cross_attention_tile.h"

namespace perceiver_fast {
namespace PF_ISA {
#if defined(__AVX512BF16__)
namespace {

using X = BFloat16;
using S = Simd<float>;
using V = S::Vec;
constexpr int64_t Q = kQueries<float>;
static_assert(Q == 2 * S::lanes, "a row of weights is one vector of bfloat16");

// a b, which the compiler may not fuse with a sum that follows: forward and backward agree to the last bit.
PF_INLINE V rounded_product(V a, V b) {
  V c = a * b;
  asm("" : "+v"(c));
  return c;
}

// Two vectors rounded to bfloat16, one behind the other.
PF_INLINE __m512i join(V first, V second) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }

// A lane of the result is the pair of its numbers in both: first the lower half, then the upper half of a join.
PF_INLINE __m512i pairs_of_halves(__m512i joined) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), joined);
}
PF_INLINE V first_of(__m512i pairs) { return (V)_mm512_slli_epi32(pairs, 16); }
PF_INLINE V second_of(__m512i pairs) { return (V)_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000u))); }

void scale(int64_t count, float factor, const float* from, X* to) {
  int64_t i = 0;
  for (; i + 2 * S::lanes <= count; i += 2 * S::lanes)
    _mm512_storeu_si512(to + i, join(S::load(from + i) * factor, S::load(from + i + S::lanes) * factor));
  for (; i < count; ++i) to[i] = narrowed<X>(factor * from[i]);
}

void pair_rows(int64_t count, int64_t length, const X* rows, int64_t row_stride, int64_t padded, Pair* to) {
  constexpr int64_t lanes = S::lanes;
  for (int64_t i = 0; i < count; i += 2, to += padded) {
    const X *first = rows + i * row_stride, *second = i + 1 < count ? first + row_stride : nullptr;
    int64_t c = 0;
    for (; c + lanes <= length; c += lanes) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(first + c)));
      __m512i high = _mm512_setzero_si512();
      if (second) high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(second + c)));
      _mm512_storeu_si512(to + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    for (; c < length; ++c) to[c] = Pair{first[c], second ? second[c] : X{}};
    for (; c < padded; ++c) to[c] = Pair{};
  }
}

// A tile's products with all queries of a block: of the logits, before they are multiplied by the tile's factor, and of the
// gradients of the weights.
PF_INLINE void tile_products(const TokenTile<X>& tile, const X* rows, int64_t row, int64_t channels, const Pair* lanes,
                             float* to) {
  tile_gemm<Pair, false>(tile.count, Q, channels / 2, reinterpret_cast<const Pair*>(rows), row / 2, 1, lanes, Q, to, Q);
}

// Whether a token is masked: a weight of zero does not hide a delta that is not finite.
template <bool Biased>
PF_INLINE bool hidden(const TokenTile<X>& tile, int64_t m) {
  return Biased && m < tile.count && tile.shift[m] == -__builtin_inff();
}

template <bool Biased>
PF_INLINE V weight_at(const TokenTile<X>& tile, int64_t m, const float* logits, V shift) {
  if (m >= tile.count) return V{};  // what makes pairs of an odd number of tokens
  return weight_of<Biased>(tile, m, rounded_product(S::load(logits), S::set(tile.factor)), shift);
}

template <bool Biased, bool Dropped>
void forward(const TokenTile<X>& tile, const ForwardBlock<X>& block, bool) {
  const FlushDenormals flush;
  tile_products(tile, tile.k, tile.k_row, tile.dim, block.q, block.scratch);
  clear_masked(tile, block.scratch);
  alignas(64) float largest[Q];
  tile_maximum<Biased>(tile, block.scratch, largest);
  for (int64_t v = 0; v < Q; v += S::lanes) S::store(largest + v, S::load(largest + v) * S::set(tile.factor));
  fit_shift(tile.dim_v, block, largest);
  const auto ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  Pair* weights = reinterpret_cast<Pair*>(block.scratch);  // in the place of logits that have been read
  for (int64_t v = 0; v < Q; v += S::lanes) {
    const V shift = S::load(block.shift + v);
    __m512 total = _mm512_setzero_ps();
    for (int64_t m = 0; m < tile.count; m += 2) {
      const float* at = block.scratch + m * Q + v;
      V p = weight_at<Biased>(tile, m, at, shift), next = weight_at<Biased>(tile, m + 1, at + Q, shift);
      __m512i pairs = pairs_of_halves(join(p, next));
      total = _mm512_dpbf16_ps(total, (__m512bh)pairs, ones);
      if (Dropped) {
        p = keep<float>(p, block.hashes + v, tile.hashes[m], tile.threshold);
        if (m + 1 < tile.count) next = keep<float>(next, block.hashes + v, tile.hashes[m + 1], tile.threshold);
        pairs = pairs_of_halves(join(p, next));
      }
      _mm512_storeu_si512(weights + m / 2 * Q + v, pairs);
    }
    S::store(block.total + v, S::load(block.total + v) + (V)total);
  }
  tile_gemm<Pair, true>(tile.dim_v, Q, operands<X>(tile.count), tile.v_pairs, 1, tile.dim_v, weights, Q, block.out, Q);
}

// From gradients of logits as rows of queries, and as pairs of tokens: dq += dS k, dk += dS q_rows.
PF_INLINE void add_gradients(const TokenTile<X>& tile, const BackwardBlock<X>& block, const Pair* rows) {
  const Pair* pairs = reinterpret_cast<const Pair*>(block.ds);
  tile_gemm<Pair, true>(tile.dim, Q, operands<X>(tile.count), tile.k_pairs, 1, tile.dim, pairs, Q, block.dq, Q);
  if (!block.dk) return;
  tile_gemm<Pair, true>(tile.count, block.pad_d, Q / 2, rows, Q / 2, 1, block.q_rows, block.pad_d, block.dk,
                        block.dk_row);
}

// Writes the gradients of tokens m and m + 1 as rows, and over those of the weights, which have been read, as pairs.
PF_INLINE void put_gradients(const BackwardBlock<X>& block, int64_t m, const V (&ds)[2][2]) {
  Pair* pairs = reinterpret_cast<Pair*>(block.ds) + m / 2 * Q;
  for (int i = 0; i < 2; ++i) _mm512_storeu_si512(block.rows + (m + i) * (Q / 2), join(ds[i][0], ds[i][1]));
  for (int v = 0; v < 2; ++v)
    _mm512_storeu_si512(pairs + v * S::lanes, pairs_of_halves(join(ds[0][v], ds[1][v])));
}

template <bool Biased, bool Dropped>
void backward(const TokenTile<X>& tile, const BackwardBlock<X>& block) {
  const FlushDenormals flush;
  tile_products(tile, tile.k, tile.k_row, tile.dim, block.q, block.p);
  clear_masked(tile, block.p);
  tile_products(tile, tile.v, tile.v_row, tile.dim_v, block.grad, block.ds);
  if (!tile.uniform) clear_masked(tile, block.ds);
  Pair* weights = reinterpret_cast<Pair*>(block.p);  // rows of queries, in the place of logits that have been read
  V sum[2] = {}, size[2] = {};
  for (int64_t m = 0; m < tile.count; m += 2) {
    V ds[2][2], kept[2][2];  // of two tokens and two vectors of queries
    for (int v = 0; v < 2; ++v) {
      const int64_t lane = v * S::lanes, at = m * Q + lane;
      const V shift = S::load(block.shift + lane), weight = S::load(block.weight + lane);
      const V delta = S::load(block.delta + lane);
      const __m512i pairs = pairs_of_halves(join(weight_at<Biased>(tile, m, block.p + at, shift),
                                                 weight_at<Biased>(tile, m + 1, block.p + at + Q, shift)));
      const V p[2] = {first_of(pairs), second_of(pairs)};
      for (int i = 0; i < 2; ++i) {
        const bool there = m + i < tile.count;
        V u = there ? S::load(block.ds + at + i * Q) * weight : V{};
        kept[i][v] = p[i] * weight;
        if (Dropped && there) {
          kept[i][v] = keep<float>(kept[i][v], block.hashes + lane, tile.hashes[m + i], tile.threshold);
          u = keep<float>(u, block.hashes + lane, tile.hashes[m + i], tile.threshold);
        }
        V change = p[i] * (u - delta);
        if (hidden<Biased>(tile, m + i)) change = V{};
        ds[i][v] = change;
        sum[v] += change;
        size[v] += S::max(change, -change);
      }
    }
    for (int i = 0; i < 2; ++i) _mm512_storeu_si512(weights + (m + i) * (Q / 2), join(kept[i][0], kept[i][1]));
    put_gradients(block, m, ds);
  }
  if (!tile.uniform) {  // else weights depend on neither q nor k
    for (int v = 0; v < 2; ++v) {
      float *sums = block.sum + v * S::lanes, *sizes = block.size + v * S::lanes;
      S::store(sums, S::load(sums) + sum[v]);
      S::store(sizes, S::load(sizes) + size[v]);
    }
    add_gradients(tile, block, block.rows);
  }
  if (!block.dv) return;
  tile_gemm<Pair, true>(tile.count, block.pad_v, Q / 2, weights, Q / 2, 1, block.grad_rows, block.pad_v, block.dv,
                        block.dv_row);
}

template <bool Biased>
void correct(const TokenTile<X>& tile, const BackwardBlock<X>& block, const float* change) {
  const FlushDenormals flush;
  tile_products(tile, tile.k, tile.k_row, tile.dim, block.q, block.p);
  clear_masked(tile, block.p);
  for (int64_t m = 0; m < tile.count; m += 2) {
    V ds[2][2];
    for (int v = 0; v < 2; ++v) {
      const int64_t lane = v * S::lanes, at = m * Q + lane;
      const V shift = S::load(block.shift + lane), less = S::load(change + lane);
      const __m512i pairs = pairs_of_halves(join(weight_at<Biased>(tile, m, block.p + at, shift),
                                                 weight_at<Biased>(tile, m + 1, block.p + at + Q, shift)));
      ds[0][v] = hidden<Biased>(tile, m) ? V{} : -first_of(pairs) * less;
      ds[1][v] = hidden<Biased>(tile, m + 1) ? V{} : -second_of(pairs) * less;
    }
    put_gradients(block, m, ds);
  }
  add_gradients(tile, block, block.rows);
}

// With dropout the tokens' shifts are added even where all are zero, as in float.
void forward_any(const TokenTile<X>& tile, const ForwardBlock<X>& block, bool fixed_shift) {
  if (tile.threshold != 0) return forward<true, true>(tile, block, fixed_shift);
  if (tile.shift != nullptr) return forward<true, false>(tile, block, fixed_shift);
  return forward<false, false>(tile, block, fixed_shift);
}

void backward_any(const TokenTile<X>& tile, const BackwardBlock<X>& block) {
  if (tile.threshold != 0) return backward<true, true>(tile, block);
  if (tile.shift != nullptr) return backward<true, false>(tile, block);
  return backward<false, false>(tile, block);
}

void correct_any(const TokenTile<X>& tile, const BackwardBlock<X>& block, const float* change) {
  return tile.shift != nullptr ? correct<true>(tile, block, change) : correct<false>(tile, block, change);
}

}  // namespace

const CrossAttentionKernels<X>* cross_attention_bfloat16_table() {
  static constexpr CrossAttentionKernels<X> table{S::lanes, int(Q),  transpose<float>, dot<X>,      scale,
                                                  nullptr,  nullptr, pair_rows,        forward_any, backward_any,
                                                  correct_any, nullptr, nullptr};
  return &table;
}
#else
const CrossAttentionKernels<BFloat16>* cross_attention_bfloat16_table() { return nullptr; }  // an older compiler
#endif

}  // namespace PF_ISA
}  // namespace perceiver_fast
