// Loops that do nothing but multiply-adds, or nothing but exponentials, for one instruction set.
#include "roofs.h"
#include "simd.h"

namespace perceiver_fast {
namespace PF_ISA {

// A chain is a row of operations that each need the one before. There are enough of them to keep two units busy while
// results are on their way (four or five cycles for an instruction, some forty for an exponential), and no more chains
// of multiply-adds than there are registers.
constexpr int kMultiplyAddChains = PF_VECTOR_BYTES == 64 ? 16 : 12;
constexpr int kExponentialChains = 12;

template <class T>
T total(const typename Simd<T>::Vec* chains, int count) {
  T sum = 0;
  for (int i = 0; i < count; ++i)
    for (int lane = 0; lane < Simd<T>::lanes; ++lane) sum += chains[i][lane];
  return sum;
}

template <class T>
T multiply_adds(int64_t rounds) {
  using V = typename Simd<T>::Vec;
  V chains[kMultiplyAddChains];
  for (int i = 0; i < kMultiplyAddChains; ++i) chains[i] = Simd<T>::set(T(i));
  volatile T factor = T(0.5), term = T(1);  // the compiler must not know them
  const V a = Simd<T>::set(factor), b = Simd<T>::set(term);
  for (int64_t round = 0; round < rounds; ++round)
    for (int i = 0; i < kMultiplyAddChains; ++i) chains[i] = fma(chains[i], a, b);
  return total<T>(chains, kMultiplyAddChains);
}

template <class T>
T exponentials(int64_t rounds) {
  using V = typename Simd<T>::Vec;
  V chains[kExponentialChains];
  for (int i = 0; i < kExponentialChains; ++i) chains[i] = Simd<T>::set(T(-1) - T(i) / 16);
  volatile T zero = 0;
  const V shift = Simd<T>::set(zero);
  // 2^x of a negative x is in (0, 1), and that minus 1.5 is negative again: no power depends on another chain's.
  const V down = Simd<T>::set(zero - T(1.5));
  for (int64_t round = 0; round < rounds; ++round)
    for (int i = 0; i < kExponentialChains; ++i) chains[i] = exp2<T, false>(chains[i], shift) + down;
  return total<T>(chains, kExponentialChains);
}

template <class T>
const RoofsKernels<T>& roofs_table() {
  static constexpr RoofsKernels<T> table{multiply_adds<T>, exponentials<T>, kMultiplyAddChains * Simd<T>::lanes,
                                         kExponentialChains * Simd<T>::lanes};
  return table;
}
template const RoofsKernels<float>& roofs_table<float>();

}  // namespace PF_ISA
}  // namespace perceiver_fast
