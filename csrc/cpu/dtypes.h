// What the bindings of ops with operands of several dtypes share.
#pragma once

#include "../core/dtypes.h"

#include "torch_stable.h"

namespace perceiver_fast {

// Calls f with the Dtypes of a pair of torch's.
template <class F>
void with_dtypes(const char* op, ScalarType wide, ScalarType narrow, F f) {
  const auto are = [&](ScalarType w, ScalarType n) { return wide == w && narrow == n; };
  if (are(ScalarType::Double, ScalarType::Double)) return f(F64());
  if (are(ScalarType::Float, ScalarType::Float)) return f(F32());
  if (are(ScalarType::BFloat16, ScalarType::BFloat16)) return f(BF16());
  if (are(ScalarType::Float, ScalarType::BFloat16)) return f(F32BF16());
  STD_TORCH_CHECK(false, op, ": expected float64, float32 or bfloat16, or bfloat16 beside parameters in float32, got ",
                  torch::headeronly::toString(narrow), " beside ", torch::headeronly::toString(wide));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": expected ", name, " in ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(t.scalar_type()));
}

// A tensor of `count` elements of a dtype, dense.
inline Tensor dense(const char* op, const char* name, const Tensor& t, int64_t count, ScalarType dtype) {
  check_dtype(op, name, t, dtype);
  STD_TORCH_CHECK(t.numel() == count, op, ": expected ", name, " of ", count, " elements, got ", t.numel());
  return torch::stable::contiguous(t);
}
inline std::optional<Tensor> dense(const char* op, const char* name, const std::optional<Tensor>& t, int64_t count,
                                   ScalarType dtype) {
  if (!t) return std::nullopt;
  return dense(op, name, *t, count, dtype);
}

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Elements of the last dimension, and how often they come.
struct Rows {
  int64_t count = 1, columns;
  Rows(const char* op, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() >= 1, op, ": expected at least one dimension, got a scalar");
    for (int64_t d = 0; d + 1 < t.dim(); ++d) count *= t.size(d);
    columns = t.size(t.dim() - 1);
  }
};

}  // namespace perceiver_fast
