#define PF_ISA avx512
#define PF_VECTOR_BYTES 64
#include "grid_attention_token_kernels.h"

namespace perceiver_fast {

extern const GridAttentionKernels<float> grid_attention_avx512_f32 = PF_ISA::kernels<float>;
extern const GridAttentionKernels<double> grid_attention_avx512_f64 = PF_ISA::kernels<double>;

}  // namespace perceiver_fast
