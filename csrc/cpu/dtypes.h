// What the bindings of ops with operands of several dtypes share.
#pragma once

#include "../core/dtypes.h"

#include "checks.h"

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

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls run with a zero of a tensor's type, double, float or BFloat16; that it is one of them has been checked before.
template <class Run>
void with_numbers(const Tensor& t, const Run& run) {
  if (t.scalar_type() == ScalarType::BFloat16) return run(BFloat16{});
  with_type(t, run);
}

// Elements of the last dimension, and how often they come.
struct Rows {
  int64_t count, columns;
  Shape shape, outer;  // of all dimensions, and of all but the last

  Rows(const Check& check, const char* name, const Tensor& t) : shape(sizes_of(t)) {
    STD_TORCH_CHECK(!shape.empty(), check.op, ": expected ", name, " of at least one dimension, got a scalar");
    columns = shape.back();
    outer.assign(shape.begin(), shape.end() - 1);
    count = check.product("rows", outer);
  }
};

}  // namespace perceiver_fast
