#define PF_ISA avx2
#define PF_VECTOR_BYTES 32
#include "roofs_kernels.h"

namespace perceiver_fast {

extern const RoofsKernels<float> roofs_avx2_f32 = PF_ISA::roofs_table<float>;

}  // namespace perceiver_fast
