#define PF_ISA baseline
#define PF_VECTOR_BYTES 16
#include "grid_attention_token_kernels.h"

namespace perceiver_fast {

extern const GridAttentionKernels<float> grid_attention_baseline_f32 = PF_ISA::kernels<float>;
extern const GridAttentionKernels<double> grid_attention_baseline_f64 = PF_ISA::kernels<double>;

}  // namespace perceiver_fast
