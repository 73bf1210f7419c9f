// Drivers of LayerNorm and a product for few rows, which are columns here (latent_columns.h). The normalised rows of a chunk
// stay in cache until they are multiplied; the backward makes them again.
#include "layer_norm_linear.h"

#include "latent_columns.h"

namespace perceiver_fast {

namespace {

template <class T>
class Pass {
 public:
  explicit Pass(const LayerNormLinear<T>& call)
      : call(call),
        x(call.rows, 1, call.channels, true),
        out(call.rows, 1, call.out_channels, true),
        D(call.channels),
        O(call.out_channels),
        work(call.rows * D * O),
        sums(O * x.padded(D) + 2 * D) {}

  void forward(int64_t chunk, T* to, Team team) const {
    const int64_t C = x.columns(chunk);
    const Aligned<T> rows(D * C), xhat(D * C), rstd(C), made(O * C);
    x.load(chunk, call.x, rows.get());
    x.kernels.normalize(D, C, rows.get(), call.eps, xhat.get(), rstd.get());
    x.kernels.affine(D, C, xhat.get(), call.gain, call.shift, rows.get());
    x.product(O, C, D, call.weight, D, 1, rows.get(), made.get(), team);
    out.store(chunk, made.get(), to);
  }

  void backward(int64_t chunk, const T* d_out, T* d_x, T* sums_, bool begins, Team team) const {
    const int64_t C = x.columns(chunk), wide = x.padded(D);
    const Aligned<T> rows(D * C), xhat(D * C), rstd(C), z(D * C), d(O * C), room(C * wide);
    T* const d_norm = sums_ + O * wide;
    if (begins) std::fill_n(d_norm, 2 * D, T(0));
    x.load(chunk, call.x, rows.get());
    x.kernels.normalize(D, C, rows.get(), call.eps, xhat.get(), rstd.get());
    x.kernels.affine(D, C, xhat.get(), call.gain, call.shift, z.get());
    out.load(chunk, d_out, d.get());
    x.turn(D, C, z.get(), room.get());
    x.outer(O, D, C, d.get(), room.get(), sums_, begins, team);
    x.product(D, C, O, call.weight, 1, D, d.get(), z.get(), team);
    std::fill_n(rows.get(), D * C, T(0));
    x.kernels.normalize_backward(D, C, z.get(), xhat.get(), rstd.get(), call.gain, rows.get(), d_norm, d_norm + D);
    if (d_x) x.store(chunk, rows.get(), d_x);
  }

  const LayerNormLinear<T>& call;
  const LatentColumns<T> x, out;
  const int64_t D, O, work, sums;  // `sums`: numbers of the gradients of weight, gain and shift
};

}  // namespace

template <class T>
void layer_norm_linear_forward(const LayerNormLinear<T>& call, T* out, const Parallel& parallel) {
  const Pass<T> pass(call);
  for_calls(pass.x.chunks(), pass.work, parallel, [&](int64_t chunk, Team team) { pass.forward(chunk, out, team); });
}

template <class T>
void layer_norm_linear_backward(const LayerNormLinear<T>& call, const T* d_out, T* d_x, T* d_gain, T* d_shift,
                                T* d_weight, const Parallel& parallel) {
  const Pass<T> pass(call);
  const Aligned<T> sums = sum_chunks<T>(
      pass.x.chunks(), pass.sums, 2 * pass.work, parallel,
      [&](int64_t chunk, T* to, bool begins, Team team) { pass.backward(chunk, d_out, d_x, to, begins, team); });
  const int64_t D = pass.D, O = pass.O, wide = pass.x.padded(D);
  copy_rows(O, D, sums.get(), wide, d_weight, D);
  std::copy_n(sums.get() + O * wide, D, d_gain);
  std::copy_n(sums.get() + O * wide + D, D, d_shift);
}

#define PF_INSTANTIATE(T)                                                                                  \
  template void layer_norm_linear_forward<T>(const LayerNormLinear<T>&, T*, const Parallel&);              \
  template void layer_norm_linear_backward<T>(const LayerNormLinear<T>&, const T*, T*, T*, T*, T*, const Parallel&);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace perceiver_fast
