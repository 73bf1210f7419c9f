// bfloat16, what it is computed in, and the combinations of dtypes that geglu and layer_norm are compiled for: their
// operands need not all be of one dtype.
#pragma once

#include <cstdint>

namespace perceiver_fast {

struct BFloat16 {
  uint16_t bits;
};

template <class X>
struct ComputeType {
  using type = X;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};

// A residual stream or a parameter may be wider than the activations beside it. Arithmetic is in T.
template <class WideType, class NarrowType>
struct Dtypes {
  using Wide = WideType;
  using Narrow = NarrowType;
  using T = typename ComputeType<WideType>::type;
};

using F64 = Dtypes<double, double>;
using F32 = Dtypes<float, float>;
using BF16 = Dtypes<BFloat16, BFloat16>;
using F32BF16 = Dtypes<float, BFloat16>;

#define PF_FOR_DTYPES(MACRO) \
  MACRO(F64)                 \
  MACRO(F32)                 \
  MACRO(BF16)                \
  MACRO(F32BF16)

}  // namespace perceiver_fast
