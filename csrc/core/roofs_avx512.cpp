#define PF_ISA avx512
#define PF_VECTOR_BYTES 64
#include "roofs_kernels.h"

namespace perceiver_fast {

extern const RoofsKernels<float> roofs_avx512_f32 = PF_ISA::roofs_table<float>;

}  // namespace perceiver_fast
