#define PF_ISA baseline
#define PF_VECTOR_BYTES 16
#include "geglu_kernels.h"

namespace perceiver_fast {

#define PF_TABLE(D, type) extern const GegluKernels<D> geglu_baseline_##type = PF_ISA::geglu_table<D>;
PF_FOR_DTYPES(PF_TABLE)

}  // namespace perceiver_fast
