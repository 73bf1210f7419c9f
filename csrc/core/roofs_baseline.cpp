#define PF_ISA baseline
#define PF_VECTOR_BYTES 16
#include "roofs_kernels.h"

namespace perceiver_fast {

extern const RoofsKernels<float> roofs_baseline_f32 = PF_ISA::roofs_table<float>;

}  // namespace perceiver_fast
