// What the operators expect of their arguments, checked before any memory is touched: exported graphs call them with
// whatever they were given. Every message says what was expected and what came.
#pragma once

#include <cmath>
#include <string>

#include "torch_stable.h"

namespace perceiver_fast {

using Shape = std::vector<int64_t>;

inline std::string text_of(const Shape& shape) {
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

inline std::string text_of(torch::headeronly::DeviceType device) {
  using torch::headeronly::DeviceType;
  switch (device) {
    case DeviceType::CUDA: return "cuda";
    case DeviceType::Meta: return "meta";
    default: return "a device of type " + std::to_string(int(device));
  }
}

// The checks of one operator's arguments; `op` begins its messages.
struct Check {
  const char* op;

  // Of any dtype and shape, on the CPU.
  void tensor(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.defined(), op, ": expected a tensor for ", name, ", got none");
    STD_TORCH_CHECK(t.is_cpu(), op, ": expected ", name, " on the cpu like all arguments, got ",
                    text_of(t.device().type()));
    STD_TORCH_CHECK(t.numel() == 0 || t.data_ptr() != nullptr, op, ": expected ", name,
                    " with memory, got a tensor whose storage was freed");
  }
  void tensor(const char* name, const std::optional<Tensor>& t) const {
    if (t) tensor(name, *t);
  }

  // Of a dtype, on the CPU.
  template <class MaybeTensor>
  void dtype(const char* name, const MaybeTensor& t, ScalarType expected) const {
    tensor(name, t);
    const Tensor* there = pointer(t);
    if (there == nullptr) return;
    STD_TORCH_CHECK(there->scalar_type() == expected, op, ": expected ", name, " in ",
                    torch::headeronly::toString(expected), ", got ", torch::headeronly::toString(there->scalar_type()));
  }

  // In float32 or float64, on the CPU; returns which.
  ScalarType floating(const char* name, const Tensor& t) const {
    tensor(name, t);
    const ScalarType found = t.scalar_type();
    STD_TORCH_CHECK(found == ScalarType::Float || found == ScalarType::Double, op, ": expected ", name,
                    " in float32 or float64, got ", torch::headeronly::toString(found));
    return found;
  }

  // Of so many dimensions; `form` names them, "[B, N, L]".
  void rank(const char* name, const Tensor& t, int64_t expected, const char* form) const {
    STD_TORCH_CHECK(t.dim() == expected, op, ": expected ", name, " ", form, ", got shape ", text_of(sizes_of(t)));
  }

  // Of a shape.
  template <class MaybeTensor>
  void shape(const char* name, const MaybeTensor& t, const Shape& expected, const char* form) const {
    const Tensor* there = pointer(t);
    if (there == nullptr) return;
    const Shape found = sizes_of(*there);
    STD_TORCH_CHECK(found == expected, op, ": expected ", name, " ", form, " = ", text_of(expected), ", got ",
                    text_of(found));
  }

  // In float32, float64 or bfloat16, on the CPU; returns which.
  ScalarType floating_or_bfloat16(const char* name, const Tensor& t) const {
    tensor(name, t);
    const ScalarType found = t.scalar_type();
    STD_TORCH_CHECK(found == ScalarType::Float || found == ScalarType::Double || found == ScalarType::BFloat16, op,
                    ": expected ", name, " in float32, float64 or bfloat16, got ", torch::headeronly::toString(found));
    return found;
  }

  // Of a dtype and shape, on the CPU; returned dense.
  Tensor dense(const char* name, const Tensor& t, ScalarType expected, const Shape& sizes, const char* form) const {
    dtype(name, t, expected);
    shape(name, t, sizes, form);
    return perceiver_fast::dense(t);
  }
  std::optional<Tensor> dense(const char* name, const std::optional<Tensor>& t, ScalarType expected, const Shape& sizes,
                              const char* form) const {
    if (!t) return std::nullopt;
    return dense(name, *t, expected, sizes, form);
  }

  // What is added to a variance.
  void eps(double value) const {
    STD_TORCH_CHECK(std::isfinite(value) && value >= 0, op, ": expected eps of at least 0, got ", value);
  }

  // A product of sizes: zero where one of them is, however large the others are.
  int64_t product(const char* what, const Shape& sizes) const {
    int64_t total = 1;
    for (int64_t size : sizes)
      if (size == 0) return 0;
    for (int64_t size : sizes)
      STD_TORCH_CHECK(!__builtin_mul_overflow(total, size, &total), op, ": expected fewer ", what,
                      " than an int64 counts, got sizes ", text_of(sizes));
    return total;
  }

  int64_t sum(const char* what, const Shape& sizes) const {
    int64_t total = 0;
    for (int64_t size : sizes)
      STD_TORCH_CHECK(!__builtin_add_overflow(total, size, &total), op, ": expected fewer ", what,
                      " than an int64 counts, got sizes ", text_of(sizes));
    return total;
  }

  // A dropout probability with the seed that decides what is dropped, and where tokens are a part of all tokens, the
  // index of the first of them.
  Dropout dropout(double probability, const std::optional<Tensor>& seed) const {
    STD_TORCH_CHECK(probability >= 0 && probability < 1, op, ": expected a dropout probability in [0, 1), got ",
                    probability);
    if (seed) {
      dtype("seed", *seed, ScalarType::Long);
      STD_TORCH_CHECK(seed->dim() == 1 && (seed->size(0) == 1 || seed->size(0) == 2), op,
                      ": expected a seed of one number, or of two with the index of the first token, got shape ",
                      text_of(sizes_of(*seed)));
    }
    if (probability == 0) return Dropout(0, 0);
    STD_TORCH_CHECK(seed, op, ": expected a seed with dropout ", probability, ", got none");
    const Tensor numbers = torch::stable::contiguous(*seed);
    const int64_t* number = data<const int64_t>(numbers);
    return Dropout(probability, uint64_t(number[0]), numbers.size(0) == 2 ? number[1] : 0);
  }

 private:
  static const Tensor* pointer(const Tensor& t) { return &t; }
  static const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }
};

// A shape with another last size.
inline Shape with_last(Shape shape, int64_t size) {
  shape.back() = size;
  return shape;
}

}  // namespace perceiver_fast
