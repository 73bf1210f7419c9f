// The kernels of grid_query_attention for one instruction set.
#include "grid_query_attention_backward_kernels.h"
#include "grid_query_attention_forward_kernels.h"

namespace perceiver_fast {
namespace PF_ISA {

template <class T>
const GridQueryKernels<T>& grid_query_attention_table() {
  static constexpr GridQueryKernels<T> table{
      Simd<T>::lanes, int(kStrip<T>),      int(kPanel),         kFew,        pack<T>,
      forward_scratch<T>, forward<T>, backward_scratch<T>, backward<T>, finish<T>};
  return table;
}
template const GridQueryKernels<float>& grid_query_attention_table<float>();
template const GridQueryKernels<double>& grid_query_attention_table<double>();

}  // namespace PF_ISA
}  // namespace perceiver_fast
