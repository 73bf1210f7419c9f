// Drivers of a few latents' cross-attention, around cross_attention's:
//
//   queries  q [H, N, d] = to_q LayerNorm(x), of a chunk of the latents that there are
//   results  y = x + to_out o, of a chunk of the batch
//
// Latents are columns (latent_columns.h), queries and what they find rows. The backward goes through the same the other way
// round.
#include "latent_cross_attention.h"

#include <algorithm>

#include "constant_weights.h"
#include "cross_attention.h"
#include "latent_columns.h"

namespace perceiver_fast {

namespace {

template <class T>
class Sides {
 public:
  explicit Sides(const LatentCrossAttention<T>& call)
      : call(call),
        x(call.x_batch, call.latents, call.channels, true),
        y(call.batch, call.latents, call.channels, true),
        kernels(x.kernels),
        N(call.latents),
        D(call.channels),
        I(call.inner),
        H(call.heads),
        d(call.inner / call.heads),
        work(call.batch * N * I * D) {}

  int64_t rest() const { return (D + 1) * x.all_columns(); }  // xhat and rstd of every chunk
  T* of_x(T* rest, int64_t chunk) const { return rest + (D + 1) * x.columns_before(chunk); }

  CrossAttentionInput<T> attention(const T* q) const {
    const int64_t row = 2 * I, element = call.tokens * row;
    auto queries = dense_heads(q, H, N, d);
    if (call.x_batch == 1) queries.batch_stride = 0;
    const HeadMatrix<const T> keys{call.keys_values, element, d, row}, values{call.keys_values + I, element, d, row};
    return {call.batch, H,      N,         call.tokens,      d,           d,    queries,
            keys,       values, call.mask, call.logit_scale, call.dropout, false};
  }

  void queries(int64_t chunk, T* rest, T* q, Team team) const;
  void queries_backward(int64_t chunk, T* rest, const T* d_q, const T* d_stream, T* d_x, T* sums, bool begins,
                        Team team) const;
  void results(int64_t chunk, const T* o, T* out, Team team) const;
  void results_backward(int64_t chunk, const T* o, const T* d_y, T* d_o, T* sums, bool begins, Team team) const;

  // Sums over chunks: of the queries' side to_q and the norm's, of the results' to_out and its bias.
  int64_t query_sums() const { return I * x.padded(D) + 2 * D; }
  int64_t result_sums() const { return D * x.padded(I) + D; }

  const LatentCrossAttention<T>& call;
  const LatentColumns<T> x, y;
  const LatentKernels<T>& kernels;
  const int64_t N, D, I, H, d, work;

 private:
  // A chunk's rows [H, N, d] of every element as columns [I, columns], and back.
  void to_columns(const LatentColumns<T>& of, int64_t chunk, const T* rows, T* columns) const {
    const int64_t C = of.columns(chunk);
    if (of.count(chunk) * N != C) std::fill_n(columns, I * C, T(0));
    rows += of.first(chunk) * N * I;
    for (int64_t i = 0; i < of.count(chunk) * H; ++i)
      kernels.transpose(N, d, rows + i * N * d, d, columns + i % H * d * C + i / H * N, C);
  }
  void to_rows(const LatentColumns<T>& of, int64_t chunk, const T* columns, T* rows) const {
    const int64_t C = of.columns(chunk);
    rows += of.first(chunk) * N * I;
    for (int64_t i = 0; i < of.count(chunk) * H; ++i)
      kernels.transpose(d, N, columns + i % H * d * C + i / H * N, C, rows + i * N * d, d);
  }
};

template <class T>
void Sides<T>::queries(int64_t chunk, T* rest, T* q, Team team) const {
  const auto& p = call.parameters;
  const int64_t C = x.columns(chunk);
  const Aligned<T> stream(D * C), normed(D * C), projected(I * C);
  T *xhat = of_x(rest, chunk), *rstd = xhat + D * C;
  x.load(chunk, call.x, stream.get());
  kernels.normalize(D, C, stream.get(), call.eps, xhat, rstd);
  kernels.affine(D, C, xhat, p.norm_weight, p.norm_bias, normed.get());
  x.product(I, C, D, p.to_q, D, 1, normed.get(), projected.get(), team);
  to_rows(x, chunk, projected.get(), q);
}

// From d_q of the chunk's latents, and what reaches them past the attention, or null where nothing does.
template <class T>
void Sides<T>::queries_backward(int64_t chunk, T* rest, const T* d_q, const T* d_stream, T* d_x, T* sums, bool begins,
                                Team team) const {
  const auto& p = call.parameters;
  const int64_t C = x.columns(chunk), wide = x.padded(D);
  const Aligned<T> stream(D * C), normed(D * C), d_projected(I * C), room(C * wide);
  const T *xhat = of_x(rest, chunk), *rstd = xhat + D * C;
  T *d_to_q = sums, *d_norm = d_to_q + I * wide;
  if (begins) std::fill_n(d_norm, 2 * D, T(0));
  to_columns(x, chunk, d_q, d_projected.get());
  kernels.affine(D, C, xhat, p.norm_weight, p.norm_bias, normed.get());
  x.turn(D, C, normed.get(), room.get());
  x.outer(I, D, C, d_projected.get(), room.get(), d_to_q, begins, team);
  x.product(D, C, I, p.to_q, 1, D, d_projected.get(), normed.get(), team);
  if (d_stream)
    x.load(chunk, d_stream, stream.get());
  else
    std::fill_n(stream.get(), D * C, T(0));
  kernels.normalize_backward(D, C, normed.get(), xhat, rstd, p.norm_weight, stream.get(), d_norm, d_norm + D);
  x.store(chunk, stream.get(), d_x);
}

template <class T>
void Sides<T>::results(int64_t chunk, const T* o, T* out, Team team) const {
  const auto& p = call.parameters;
  const int64_t C = y.columns(chunk);
  const Aligned<T> stream(D * C), branch(D * C), made(I * C);
  to_columns(y, chunk, o, made.get());
  y.product(D, C, I, p.to_out, I, 1, made.get(), branch.get(), team);
  if (call.adds)
    y.load(chunk, call.x, stream.get(), call.x_batch == 1);
  else
    std::fill_n(stream.get(), D * C, T(0));
  kernels.join(D, C, branch.get(), p.to_out_bias, nullptr, stream.get());
  y.store(chunk, stream.get(), out);
}

template <class T>
void Sides<T>::results_backward(int64_t chunk, const T* o, const T* d_y, T* d_o, T* sums, bool begins,
                                Team team) const {
  const auto& p = call.parameters;
  const int64_t C = y.columns(chunk), wide = y.padded(I);
  const Aligned<T> stream(D * C), made(I * C), d_made(I * C), room(C * wide);
  T *d_to_out = sums, *d_to_out_bias = d_to_out + D * wide;
  y.load(chunk, d_y, stream.get());
  if (begins) std::fill_n(d_to_out_bias, D, T(0));
  kernels.row_sums(D, C, stream.get(), d_to_out_bias);
  y.product(I, C, D, p.to_out, 1, I, stream.get(), d_made.get(), team);
  to_rows(y, chunk, d_made.get(), d_o);
  to_columns(y, chunk, o, made.get());
  y.turn(I, C, made.get(), room.get());
  y.outer(D, I, C, stream.get(), room.get(), d_to_out, begins, team);
}

}  // namespace

template <class T>
int64_t latent_cross_attention_rest(const LatentCrossAttention<T>& call) {
  return Sides<T>(call).rest();
}

template <class T>
void latent_cross_attention_forward(const LatentCrossAttention<T>& call, T* y,
                                    const LatentCrossAttentionSaved<T>& saved, const Parallel& parallel) {
  const Sides<T> sides(call);
  for_calls(sides.x.chunks(), sides.work, parallel,
            [&](int64_t chunk, Team team) { sides.queries(chunk, saved.rest, saved.q, team); });
  const auto in = sides.attention(saved.q);
  cross_attention_forward<T>(in, dense_outputs(in, saved.o), saved.lse, nullptr, parallel);
  for_calls(sides.y.chunks(), sides.work, parallel,
            [&](int64_t chunk, Team team) { sides.results(chunk, saved.o, y, team); });
}

template <class T>
void latent_cross_attention_backward(const LatentCrossAttention<T>& call, const T* d_y,
                                     const LatentCrossAttentionSaved<T>& saved, T* d_x, T* d_keys_values,
                                     const LatentCrossAttentionParameters<T>& gradients, const Parallel& parallel) {
  const Sides<T> sides(call);
  const int64_t B = call.batch, N = sides.N, D = sides.D, I = sides.I, element = call.tokens * 2 * I;
  const Aligned<T> d_o(B * N * I), d_q(B * N * I);
  const Aligned<T> of_results = sum_chunks<T>(
      sides.y.chunks(), sides.result_sums(), sides.work, parallel, [&](int64_t chunk, T* sums, bool begins, Team team) {
        sides.results_backward(chunk, saved.o, d_y, d_o.get(), sums, begins, team);
      });
  const auto in = sides.attention(saved.q);
  const HeadMatrix<T> d_keys{d_keys_values, element, sides.d, 2 * I}, d_values{d_keys_values + I, element, sides.d, 2 * I};
  cross_attention_backward<T>(in, dense_outputs<const T>(in, saved.o), saved.lse, nullptr,
                              dense_outputs<const T>(in, d_o.get()), nullptr, dense_queries(in, d_q.get()), d_keys,
                              d_values, parallel);
  clear_constants(in, d_q.get(), d_keys);
  const bool shared = call.x_batch == 1 && B > 1;
  const Aligned<T> summed(shared ? N * I : 0), stream(shared ? N * D : 0);
  if (shared) {
    sum_batch(B, N * I, d_q.get(), summed.get());
    sum_batch(B, N * D, d_y, stream.get());
  }
  const T* const d_stream = !call.adds ? nullptr : shared ? stream.get() : d_y;
  const Aligned<T> of_queries = sum_chunks<T>(
      sides.x.chunks(), sides.query_sums(), sides.work, parallel, [&](int64_t chunk, T* sums, bool begins, Team team) {
        sides.queries_backward(chunk, saved.rest, shared ? summed.get() : d_q.get(), d_stream, d_x, sums, begins, team);
      });
  const int64_t wide = sides.x.padded(D), wide_inner = sides.x.padded(I);
  copy_rows(I, D, of_queries.get(), wide, gradients.to_q, D);
  std::copy_n(of_queries.get() + I * wide, D, gradients.norm_weight);
  std::copy_n(of_queries.get() + I * wide + D, D, gradients.norm_bias);
  copy_rows(D, I, of_results.get(), wide_inner, gradients.to_out, I);
  std::copy_n(of_results.get() + D * wide_inner, D, gradients.to_out_bias);
}

#define PF_INSTANTIATE(T)                                                                                             \
  template int64_t latent_cross_attention_rest<T>(const LatentCrossAttention<T>&);                                    \
  template void latent_cross_attention_forward<T>(const LatentCrossAttention<T>&, T*,                                 \
                                                  const LatentCrossAttentionSaved<T>&, const Parallel&);              \
  template void latent_cross_attention_backward<T>(const LatentCrossAttention<T>&, const T*,                          \
                                                   const LatentCrossAttentionSaved<T>&, T*, T*,                       \
                                                   const LatentCrossAttentionParameters<T>&, const Parallel&);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace perceiver_fast
