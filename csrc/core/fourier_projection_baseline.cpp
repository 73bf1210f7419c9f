#define PF_ISA baseline
#define PF_VECTOR_BYTES 16
#include "fourier_projection_kernels.h"

namespace perceiver_fast {

extern const FourierProjectionKernels<float> fourier_projection_baseline_f32 = PF_ISA::kernels<float>;
extern const FourierProjectionKernels<double> fourier_projection_baseline_f64 = PF_ISA::kernels<double>;

}  // namespace perceiver_fast
