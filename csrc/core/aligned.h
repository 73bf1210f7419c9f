// Uninitialised memory for `count` numbers, aligned for any instruction set's vectors.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace perceiver_fast {

template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count = 0)
      : data_(static_cast<T*>(::operator new(sizeof(T) * (count > 0 ? count : 1), kAlignment))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace perceiver_fast
