// Attention weights that do not depend on queries and keys.
#pragma once

#include <algorithm>

#include "cross_attention.h"

namespace perceiver_fast {

// Where an element sees one token, or none and so all alike, its weights do not depend on queries and keys: their gradients
// are exactly zero, not rounding errors.
template <class T>
void clear_constants(const CrossAttentionInput<T>& in, T* dq, const HeadMatrix<T>& dk) {
  const int64_t element = in.heads * in.queries * in.dim;
  for (int64_t b = 0; b < in.batch; ++b) {
    const uint8_t* mask = in.mask ? in.mask + b * in.tokens : nullptr;
    const int64_t seen = mask ? std::count_if(mask, mask + in.tokens, [](uint8_t m) { return m != 0; }) : in.tokens;
    if (seen > 1) continue;
    std::fill_n(dq + b * element, element, T(0));
    for (int64_t i = 0; dk.data != nullptr && i < in.heads * in.tokens; ++i)
      std::fill_n(dk.at(b, i / in.tokens, i % in.tokens), in.dim, T(0));
  }
}

}  // namespace perceiver_fast
