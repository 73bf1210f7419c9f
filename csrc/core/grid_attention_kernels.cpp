// The kernels of grid attention for one instruction set: loops with queries in the lanes, and loops with tokens there.
#include "grid_attention_query_kernels.h"
#include "grid_attention_token_kernels.h"

namespace perceiver_fast {
namespace PF_ISA {

template <class T>
const GridAttentionKernels<T>& grid_attention_table() {
  static constexpr GridAttentionKernels<T> table{
      Simd<T>::lanes,        accumulate_any<T, false>, accumulate_any<T, true>, maximum<T>,
      token_gradient_any<T>, token_sums_any<T>,        token_delta_any<T>};
  return table;
}
template const GridAttentionKernels<float>& grid_attention_table<float>();
template const GridAttentionKernels<double>& grid_attention_table<double>();

}  // namespace PF_ISA
}  // namespace perceiver_fast
