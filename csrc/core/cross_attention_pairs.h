// BFloat16 in streaming attention: which calls its own kernels take, and the pairs they read (pairs.h).
#pragma once

#include <algorithm>

#include "cross_attention.h"
#include "cross_attention_block.h"
#include "few_attention.h"
#include "lanes.h"

namespace perceiver_fast {

PF_DECLARE_TABLE(CrossAttentionKernels, cross_attention, avx512_bf16)

// The kernels that multiply pairs of bfloat16; null where this CPU has no instruction for it, or better ones (AMX), for
// which torch has kernels.
inline const CrossAttentionKernels<BFloat16>* bfloat16_cross_attention_kernels() {
#if defined(__x86_64__)
  if (multiplies_bfloat16_pairs()) return &avx512_bf16::cross_attention_table<BFloat16>();
#endif
  return nullptr;
}

// Whether those kernels run a call: rows are read as pairs of channels. Few latents that leave more than a fifth of the
// lanes of a block empty are computed faster as columns of floats (few_attention.h). On an AMD EPYC (Zen 4) a step of 16
// latents took 0.8 times as long there, of 32 latents 1.2 times.
inline bool takes_pairs(const CrossAttentionInput<BFloat16>& in) {
  const int64_t odd = (in.dim | in.dim_v | in.k.row_stride | in.v.row_stride | in.q.row_stride) & 1;
  if (odd || in.inverted || !(in.scale > 0) || bfloat16_cross_attention_kernels() == nullptr) return false;
  const int64_t width = bfloat16_cross_attention_kernels()->queries, empty = (width - in.queries % width) % width;
  return !FewAttention<BFloat16>::takes(in) || in.queries > 2 * width || 5 * empty <= in.queries + empty;
}

// table[c / 2][lane] = the pair rows[lane][c], rows[lane][c + 1] for `count` rows, zero in the other lanes.
inline void rows_to_lanes(const BFloat16* rows, int64_t row_stride, int64_t count, int64_t length, int64_t lanes,
                          const float*, Pair* table) {
  for (int64_t c0 = 0; c0 < length; c0 += 2 * kLineFloats) {
    const int64_t c1 = std::min(c0 + 2 * kLineFloats, length);
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t c = c0; c < c1; c += 2)
        table[c / 2 * lanes + lane] =
            lane < count ? Pair{rows[lane * row_stride + c], rows[lane * row_stride + c + 1]} : Pair{};
  }
}

// to[i / 2][c] = the pair rows[i][c], rows[i + 1][c] for `count` rows of `length`, zero where there is none; rows of `to`
// are `padded` long. Returns `to`.
inline Pair* pair_rows(const BFloat16* rows, int64_t row_stride, int64_t count, int64_t length, int64_t padded,
                       Pair* to) {
  for (int64_t i = 0; i < count; i += 2) {
    const BFloat16 *first = rows + i * row_stride, *second = first + row_stride;
    Pair* row = to + i / 2 * padded;
    for (int64_t c = 0; c < length; ++c) row[c] = Pair{first[c], i + 1 < count ? second[c] : BFloat16{}};
    for (int64_t c = length; c < padded; ++c) row[c] = Pair{};
  }
  return to;
}

}  // namespace perceiver_fast
