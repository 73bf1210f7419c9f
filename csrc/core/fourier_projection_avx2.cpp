#define PF_ISA avx2
#define PF_VECTOR_BYTES 32
#include "fourier_projection_kernels.h"

namespace perceiver_fast {

extern const FourierProjectionKernels<float> fourier_projection_avx2_f32 = PF_ISA::kernels<float>;
extern const FourierProjectionKernels<double> fourier_projection_avx2_f64 = PF_ISA::kernels<double>;

}  // namespace perceiver_fast
