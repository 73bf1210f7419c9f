#define PF_ISA baseline
#define PF_VECTOR_BYTES 16
#include "cross_attention_kernels.h"

namespace perceiver_fast {

extern const CrossAttentionKernels<float> cross_attention_baseline_f32 = PF_ISA::kernels<float>;
extern const CrossAttentionKernels<double> cross_attention_baseline_f64 = PF_ISA::kernels<double>;

}  // namespace perceiver_fast
