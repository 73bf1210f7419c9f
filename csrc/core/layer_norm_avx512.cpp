#define PF_ISA avx512
#define PF_VECTOR_BYTES 64
#include "layer_norm_kernels.h"

namespace perceiver_fast {

#define PF_TABLE(D, type) extern const LayerNormKernels<D> layer_norm_avx512_##type = PF_ISA::layer_norm_table<D>;
PF_FOR_DTYPES(PF_TABLE)

}  // namespace perceiver_fast
