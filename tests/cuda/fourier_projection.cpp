// The kernels of csrc/cuda/fourier_projection.cu and their sine and cosine, on the host, for ctypes.
#include "emulation.h"

#include "../../csrc/cuda/fourier_projection_dtokens.cuh"

using namespace perceiver_fast;

template <class T>
static void sin_cos(int64_t count, const double* position, double frequency, T* sine, T* cosine) {
  for (int64_t i = 0; i < count; ++i) sin_cos_pi<T>(position[i], frequency, sine[i], cosine[i]);
}

struct Sizes {
  int64_t tokens, positions;
  int32_t features, axes, bands, columns, downwards;
};

template <class T>
static FourierTokens<T> tokens_of(const Sizes& n, const T* feat, const double* coords, const double* frequencies) {
  emulation::downwards = n.downwards;
  return {feat, coords, frequencies, n.tokens, n.positions, n.features, n.axes, n.bands};
}

template <class T>
static void forward(const Sizes& n, const T* feat, const double* coords, const double* frequencies, const T* weight,
                    const T* bias, double eps, T* scale, T* out) {
  fourier_projection_forward<T>(emulation::Launch{kThreads}, tokens_of(n, feat, coords, frequencies), weight, bias,
                                n.columns, eps, scale, out);
}

// Uninitialised workspaces hold NaN, so that reading one before it is written shows.
template <class T>
static void backward(const Sizes& n, const T* feat, const double* coords, const double* frequencies, const T* weight,
                     const T* d_out, const T* scale, T* dweight, T* dfeat, double* dcoords) {
  const FourierTokens<T> tokens = tokens_of(n, feat, coords, frequencies);
  const emulation::Launch launch{kThreads};
  std::vector<T> partial(size_t(weight_splits(tokens, n.columns)) * tokens.channels * n.columns, T(NAN));
  std::vector<double> spread(n.tokens * n.axes, NAN), rows(n.tokens * n.axes, NAN);
  fourier_projection_dweight<T>(launch, tokens, d_out, scale, n.columns, partial.data(), dweight);
  fourier_projection_dtokens<T>(launch, tokens, d_out, weight, scale, n.columns, scale ? spread.data() : nullptr,
                                rows.data(), dfeat, dcoords);
}

#define PF_EXPORT(T, SUFFIX)                                                                                          \
  extern "C" void sin_cos_##SUFFIX(int64_t count, const double* position, double frequency, T* sine, T* cosine) {      \
    sin_cos(count, position, frequency, sine, cosine);                                                                 \
  }                                                                                                                    \
  extern "C" void forward_##SUFFIX(const Sizes* n, const T* feat, const double* coords, const double* frequencies,     \
                                   const T* weight, const T* bias, double eps, T* scale, T* out) {                     \
    forward(*n, feat, coords, frequencies, weight, bias, eps, scale, out);                                             \
  }                                                                                                                    \
  extern "C" void backward_##SUFFIX(const Sizes* n, const T* feat, const double* coords, const double* frequencies,    \
                                    const T* weight, const T* d_out, const T* scale, T* dweight, T* dfeat,             \
                                    double* dcoords) {                                                                 \
    backward(*n, feat, coords, frequencies, weight, d_out, scale, dweight, dfeat, dcoords);                            \
  }
PF_EXPORT(float, float32)
PF_EXPORT(double, float64)
