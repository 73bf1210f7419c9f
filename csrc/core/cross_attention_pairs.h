// BFloat16 in streaming attention: which calls its own kernels take, and the pairs they read (pairs.h).
#pragma once

#include "cross_attention.h"
#include "cross_attention_block.h"
#include "few_attention.h"

namespace perceiver_fast {

namespace avx512_bf16 {
const CrossAttentionKernels<BFloat16>* cross_attention_bfloat16_table();  // null where the compiler does not know them
}

// The kernels that multiply pairs of bfloat16; null where this CPU has no instruction for it, or better ones (AMX), for
// which torch has kernels.
inline const CrossAttentionKernels<BFloat16>* bfloat16_cross_attention_kernels() {
#if defined(__x86_64__)
  if (multiplies_bfloat16_pairs()) return avx512_bf16::cross_attention_bfloat16_table();
#endif
  return nullptr;
}

// Whether those kernels run a call: rows are read as pairs of channels. Few latents that leave more than a fifth of the
// lanes of a block empty are computed faster as columns of floats (few_attention.h). On an AMD EPYC (Zen 4) a step of 16
// latents took 0.7 to 0.9 times as long there, of 32 latents 1.1 to 1.2 times.
inline bool takes_pairs(const CrossAttentionInput<BFloat16>& in) {
  const int64_t odd = (in.dim | in.dim_v | in.k.row_stride | in.v.row_stride | in.q.row_stride) & 1;
  if (odd || in.inverted || !(in.scale > 0) || bfloat16_cross_attention_kernels() == nullptr) return false;
  const int64_t width = bfloat16_cross_attention_kernels()->queries, empty = (width - in.queries % width) % width;
  return !FewAttention<BFloat16>::takes(in) || in.queries > 2 * width || 5 * empty <= in.queries + empty;
}

}  // namespace perceiver_fast
