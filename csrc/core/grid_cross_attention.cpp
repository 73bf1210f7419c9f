// Drivers of cross-attention to a grid, around grid_attention's, and to tokens of no axis, around cross_attention's:
//
//   tables   [keys | values] [2 I, L] = to_kv' basis^T, to_kv' with LayerNorm's weight and less its rows' means
//   queries  q [H N, L] = (to_q LayerNorm(x)) keys, of a chunk of the latents that there are
//   results  y = x + to_out (o values^T + bias), of a chunk of the batch
//
// Latents are columns (latent_columns.h). The backward goes through the same three the other way round.
#include "grid_cross_attention.h"

#include <algorithm>

#include "constant_weights.h"
#include "cross_attention.h"
#include "grid_attention.h"
#include "latent_columns.h"

namespace perceiver_fast {

namespace {

template <class T>
class Sides {
 public:
  explicit Sides(const GridCrossAttention<T>& call)
      : call(call),
        x(call.x_batch, call.latents, call.channels, false),
        y(call.batch, call.latents, call.channels, false),
        kernels(x.kernels),
        N(call.latents),
        D(call.channels),
        I(call.inner),
        H(call.heads),
        d(call.inner / call.heads),
        channels(call.context_channels),
        L(call.features) {
    for (int64_t size : call.sizes) L += size;
    row = x.padded(L);
    tables_size = 2 * I * (row + 1);
    work = call.batch * N * I * (D + L);
  }

  // Saved: the tables; xhat, rstd and to_q's product of every chunk of latents; what to_out multiplies of every one of the
  // batch.
  T* of_x(T* rest, int64_t chunk) const { return rest + tables_size + (D + 1 + I) * x.columns_before(chunk); }
  T* of_y(T* rest, int64_t chunk) const { return of_x(rest, 0) + (D + 1 + I) * x.all_columns() + I * y.columns_before(chunk); }
  int64_t rest() const { return tables_size + (D + 1 + I) * x.all_columns() + I * y.all_columns(); }

  // The first of a head's rows of q or o.
  int64_t at(int64_t element, int64_t head) const { return (element * H + head) * N * L; }

  bool has_axes() const { return !call.sizes.empty(); }

  // Tokens of no axis are the keys and values of all heads.
  CrossAttentionInput<T> attention_to_tokens(const T* q) const {
    const HeadMatrix<const T> tokens{call.feat, call.tokens * L, 0, L};
    auto queries = dense_heads(q, 1, H * N, L);
    if (call.x_batch == 1) queries.batch_stride = 0;
    return {call.batch, 1, H * N, call.tokens, L, L, queries, tokens, tokens, call.mask, 1.0, Dropout(0, 0), false};
  }

  GridAttentionInput<T> attention(const T* q) const {
    GridAttentionInput<T> in;
    in.batch = call.batch;
    in.queries = H * N;
    in.features = call.features;
    in.heads = 1;
    in.sizes = call.sizes;
    in.q = q;
    in.q_batch_stride = call.x_batch == 1 ? 0 : H * N * L;
    in.feat = call.feat;
    in.scale = call.scale;
    in.mask = call.mask;
    in.dropout = call.dropout;
    return in;
  }

  void basis(T* to, int64_t row) const;
  void tables(T* tables, Team team) const;
  void tables_backward(const T* d_tables, const GridCrossAttentionParameters<T>& to, Team team) const;
  void queries(int64_t chunk, T* rest, T* q, Team team) const;
  void queries_backward(int64_t chunk, T* rest, const T* d_q, const T* d_stream, T* d_x, T* sums, bool begins,
                        Team team) const;
  void results(int64_t chunk, const GridCrossAttentionSaved<T>& saved, T* out, Team team) const;
  void results_backward(int64_t chunk, const GridCrossAttentionSaved<T>& saved, const T* d_y, T* d_o, T* d_kept, T* sums,
                        bool begins, Team team) const;

  // body(row of I, its column in made, its query in kept) for all latents of a chunk of the batch.
  template <class Body>
  void for_kept(int64_t chunk, const Body& body) const {
    for (int64_t i = 0; i < y.count(chunk) * H; ++i)
      for (int64_t r = i % H * d; r < (i % H + 1) * d; ++r)
        for (int64_t n = 0; n < N; ++n) body(r, i / H * y.padded_N + n, (y.first(chunk) * H + i) * N + n);
  }

  // Heads that are worked on at once: all where a team shares their rows, else one, whose numbers stay in cache.
  int64_t heads_at_once(Team team) const { return team.parallel != nullptr && team.parallel->threads > 1 ? H : 1; }

  // body(head, begin, end) for `rows` rows of each of `heads` heads from `first` on, which the team shares; a head's work is
  // `work`.
  template <class Body>
  void for_rows_of_heads(int64_t first, int64_t heads, int64_t rows, int64_t work, Team team, const Body& body) const {
    team.run(heads * rows, 8, heads * work, [&](int64_t at, int64_t last) {
      while (at < last) {
        const int64_t begin = at % rows, end = std::min(rows, begin + last - at);
        body(first + at / rows, begin, end);
        at += end - begin;
      }
    });
  }

  // Sums over chunks: of the queries' side to_q, the norm's and the keys, of the results' to_out, its bias, the values and
  // their bias.
  int64_t query_sums() const { return I * x.padded(D) + 2 * D + I * row; }
  int64_t result_sums() const { return D * x.padded(I) + D + I * row + I; }

  const GridCrossAttention<T>& call;
  const LatentColumns<T> x, y;
  const LatentKernels<T>& kernels;
  const int64_t N, D, I, H, d, channels;
  int64_t L, row, tables_size, work;  // `row`: L, padded to whole vectors
};

// to_kv with LayerNorm's weight, a row less its mean.
template <class T>
void centred_row(int64_t channels, const T* weight, const T* norm, T* to) {
  double sum = 0;
  for (int64_t c = 0; c < channels; ++c) sum += to[c] = weight[c] * norm[c];
  const T mean = T(sum / channels);
  for (int64_t c = 0; c < channels; ++c) to[c] -= mean;
}

// Tokens [L, row] that are one raw channel or the code of one index alone. That of the mean of raw channels would be ones of
// these; it lacks ones of the codes' channels, as centred weights do not see the same in all channels.
template <class T>
void Sides<T>::basis(T* to, int64_t row) const {
  const int64_t raw = call.raw_channels();
  std::fill_n(to, L * row, T(0));
  for (int64_t f = 0; f < raw; ++f) to[f * row + f] = 1;
  if (call.features > raw) std::fill_n(to + raw * row + raw, channels - raw, T(-1));
  to += call.features * row + raw;
  for (size_t a = 0; a < call.sizes.size(); ++a) {
    const int64_t size = call.sizes[a], width = call.code_channels[a];
    copy_rows(size, width, call.codes[a], width, to, row);
    to += size * row + width;
  }
}

// [2 I, row], keys times the scale of the logits, and behind it what the norm's bias adds to keys and values [2 I].
template <class T>
void Sides<T>::tables(T* tables, Team team) const {
  const auto& p = call.parameters;
  const Aligned<T> weight(2 * I * channels), tokens(has_axes() ? L * channels : 0), turned(has_axes() ? channels * row : 0);
  if (has_axes()) {
    basis(tokens.get(), channels);
    std::fill_n(turned.get(), channels * row, T(0));
    kernels.transpose(L, channels, tokens.get(), channels, turned.get(), row);
  }
  T* bias = tables + 2 * I * row;
  team.run(2 * I, 8, 2 * I * row * channels, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      centred_row(channels, p.to_kv + r * channels, p.context_weight, weight.get() + r * channels);
      T sum = 0;
      for (int64_t c = 0; c < channels; ++c) sum += p.to_kv[r * channels + c] * p.context_bias[c];
      bias[r] = sum;
    }
    if (has_axes()) {
      kernels.product(end - begin, row, channels, weight.get() + begin * channels, channels, 1, turned.get(), row,
                      tables + begin * row, row, false);
    } else {
      std::fill_n(tables + begin * row, (end - begin) * row, T(0));
      copy_rows(end - begin, channels, weight.get() + begin * channels, channels, tables + begin * row, row);
    }
    for (int64_t i = begin * row; i < std::min(end, I) * row; ++i) tables[i] *= T(call.logit_scale);
  });
}

// From the gradients of the keys, of the values [I, row] each, and of what is added to values [I].
template <class T>
void Sides<T>::tables_backward(const T* d_tables, const GridCrossAttentionParameters<T>& to, Team team) const {
  const auto& p = call.parameters;
  const int64_t wide = x.padded(channels);
  const Aligned<T> tokens(has_axes() ? L * wide : 0), d_weight(2 * I * wide);
  if (has_axes()) {
    basis(tokens.get(), wide);
    team.run(2 * I, 8, 2 * I * wide * L, [&](int64_t begin, int64_t end) {
      kernels.product(end - begin, wide, L, d_tables + begin * row, row, 1, tokens.get(), wide,
                      d_weight.get() + begin * wide, wide, false);
    });
  } else {
    std::copy_n(d_tables, 2 * I * row, d_weight.get());
  }
  const T* d_bias = d_tables + 2 * I * row;
  std::fill_n(to.context_weight, channels, T(0));
  std::fill_n(to.context_bias, channels, T(0));
  for (int64_t r = 0; r < 2 * I; ++r) {
    const T* weight = p.to_kv + r * channels;
    T *d = d_weight.get() + r * wide, *d_to = to.to_kv + r * channels;
    const T scale = r < I ? T(call.logit_scale) : T(1), added = r < I ? T(0) : d_bias[r - I];
    double sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += d[c];
    const T mean = T(sum / channels);
    for (int64_t c = 0; c < channels; ++c) {
      const T grad = (d[c] - mean) * scale;
      d_to[c] = grad * p.context_weight[c] + added * p.context_bias[c];
      to.context_weight[c] += grad * weight[c];
      to.context_bias[c] += added * weight[c];
    }
  }
}

template <class T>
void Sides<T>::queries(int64_t chunk, T* rest, T* q, Team team) const {
  const auto& p = call.parameters;
  const int64_t C = x.columns(chunk);
  const Aligned<T> stream(D * C), normed(D * C);
  T *xhat = of_x(rest, chunk), *rstd = xhat + D * C, *projected = rstd + C;
  x.load(chunk, call.x, stream.get());
  kernels.normalize(D, C, stream.get(), call.eps, xhat, rstd);
  kernels.affine(D, C, xhat, p.norm_weight, p.norm_bias, normed.get());
  x.product(I, C, D, p.to_q, D, 1, normed.get(), projected, team);
  for (int64_t e = 0; e < x.count(chunk); ++e)
    for_rows_of_heads(0, H, N, N * d * row, team, [&](int64_t h, int64_t begin, int64_t end) {
      const Aligned<T> padded((end - begin) * row);
      kernels.product(end - begin, row, d, projected + h * d * C + e * x.padded_N + begin, 1, C, rest + h * d * row, row,
                      padded.get(), row, false);
      copy_rows(end - begin, L, padded.get(), row, q + at(x.first(chunk) + e, h) + begin * L, L);
    });
}

// d_q of the chunk's latents, and what reaches them past the attention.
template <class T>
void Sides<T>::queries_backward(int64_t chunk, T* rest, const T* d_q, const T* d_stream, T* d_x, T* sums,
                                bool begins, Team team) const {
  const auto& p = call.parameters;
  const int64_t C = x.columns(chunk), wide = x.padded(D);
  const Aligned<T> stream(D * C), normed(D * C), d_projected(I * C), room(C * wide);
  const int64_t together = heads_at_once(team);
  const Aligned<T> padded(together * N * row), turned(together * L * x.padded_N);
  const T *xhat = of_x(rest, chunk), *rstd = xhat + D * C, *projected = rstd + C;
  T *d_to_q = sums, *d_norm = d_to_q + I * wide, *d_keys = d_norm + 2 * D;
  std::fill_n(padded.get(), together * N * row, T(0));
  std::fill_n(turned.get(), together * L * x.padded_N, T(0));
  if (begins) std::fill_n(d_norm, 2 * D, T(0));
  for (int64_t i = 0; i < x.count(chunk) * H; i += together) {
    const int64_t e = i / H, first_head = i % H;
    for (int64_t h = 0; h < together; ++h) {
      const T* from = d_q + at(x.first(chunk) + e, first_head + h);
      copy_rows(N, L, from, L, padded.get() + h * N * row, row);
      kernels.transpose(N, L, from, L, turned.get() + h * L * x.padded_N, x.padded_N);
    }
    for_rows_of_heads(first_head, together, d, 2 * N * d * row, team, [&](int64_t h, int64_t begin, int64_t end) {
      const int64_t r = h * d + begin, first = r * C + e * x.padded_N, own = h - first_head;
      kernels.product(end - begin, x.padded_N, L, rest + r * row, row, 1, turned.get() + own * L * x.padded_N, x.padded_N,
                      d_projected.get() + first, C, false);
      kernels.product(end - begin, row, N, projected + first, C, 1, padded.get() + own * N * row, row, d_keys + r * row,
                      row, !begins || e > 0);
    });
  }
  kernels.affine(D, C, xhat, p.norm_weight, p.norm_bias, normed.get());
  x.turn(D, C, normed.get(), room.get());
  x.outer(I, D, C, d_projected.get(), room.get(), d_to_q, begins, team);
  x.product(D, C, I, p.to_q, 1, D, d_projected.get(), normed.get(), team);
  x.load(chunk, d_stream, stream.get());
  kernels.normalize_backward(D, C, normed.get(), xhat, rstd, p.norm_weight, stream.get(), d_norm, d_norm + D);
  x.store(chunk, stream.get(), d_x);
}

template <class T>
void Sides<T>::results(int64_t chunk, const GridCrossAttentionSaved<T>& saved, T* out, Team team) const {
  const auto& p = call.parameters;
  const T* o = saved.o;
  T* rest = saved.rest;
  const int64_t C = y.columns(chunk);
  const int64_t together = heads_at_once(team);
  const Aligned<T> stream(D * C), branch(D * C), turned(together * L * y.padded_N);
  T* made = of_y(rest, chunk);
  const T *values = rest + I * row, *bias = rest + 2 * I * row + I;
  std::fill_n(turned.get(), together * L * y.padded_N, T(0));
  for (int64_t i = 0; i < y.count(chunk) * H; i += together) {
    const int64_t e = i / H, first_head = i % H;
    for (int64_t h = 0; h < together; ++h)
      kernels.transpose(N, L, o + at(y.first(chunk) + e, first_head + h), L, turned.get() + h * L * y.padded_N, y.padded_N);
    for_rows_of_heads(first_head, together, d, N * d * row, team, [&](int64_t h, int64_t begin, int64_t end) {
      const int64_t r = h * d + begin;
      kernels.product(end - begin, y.padded_N, L, values + r * row, row, 1,
                      turned.get() + (h - first_head) * L * y.padded_N, y.padded_N, made + r * C + e * y.padded_N, C,
                      false);
    });
  }
  if (saved.kept)
    for_kept(chunk, [&](int64_t r, int64_t column, int64_t query) { made[r * C + column] += bias[r] * saved.kept[query]; });
  else
    kernels.add_bias(I, C, bias, made);
  y.product(D, C, I, p.to_out, I, 1, made, branch.get(), team);
  y.load(chunk, call.x, stream.get(), call.x_batch == 1);
  kernels.join(D, C, branch.get(), p.to_out_bias, nullptr, stream.get());
  y.store(chunk, stream.get(), out);
}

template <class T>
void Sides<T>::results_backward(int64_t chunk, const GridCrossAttentionSaved<T>& saved, const T* d_y, T* d_o, T* d_kept,
                                T* sums, bool begins, Team team) const {
  const auto& p = call.parameters;
  const T *o = saved.o, *bias = saved.rest + 2 * I * row + I;
  T* rest = saved.rest;
  const int64_t C = y.columns(chunk), wide = x.padded(I);
  const Aligned<T> stream(D * C), d_made(I * C), room(C * wide);
  const int64_t together = heads_at_once(team);
  const Aligned<T> padded(together * N * row);
  const T *made = of_y(rest, chunk), *values = rest + I * row;
  T *d_to_out = sums, *d_to_out_bias = d_to_out + D * wide, *d_values = d_to_out_bias + D, *d_bias = d_values + I * row;
  y.load(chunk, d_y, stream.get());
  if (begins) {
    std::fill_n(d_to_out_bias, D, T(0));
    std::fill_n(d_bias, I, T(0));
  }
  kernels.row_sums(D, C, stream.get(), d_to_out_bias);
  y.product(I, C, D, p.to_out, 1, I, stream.get(), d_made.get(), team);
  y.turn(I, C, made, room.get());
  y.outer(D, I, C, stream.get(), room.get(), d_to_out, begins, team);
  if (saved.kept) {
    std::fill_n(d_kept + y.first(chunk) * H * N, y.count(chunk) * H * N, T(0));
    for_kept(chunk, [&](int64_t r, int64_t column, int64_t query) {
      const T grad = d_made.get()[r * C + column];
      d_bias[r] += grad * saved.kept[query];
      d_kept[query] += grad * bias[r];
    });
  } else {
    kernels.row_sums(I, C, d_made.get(), d_bias);
  }
  for (int64_t i = 0; i < y.count(chunk) * H; i += together) {
    const int64_t e = i / H, first_head = i % H;
    for_rows_of_heads(first_head, together, N, N * d * row, team, [&](int64_t h, int64_t begin, int64_t end) {
      const int64_t of = at(y.first(chunk) + e, h) + begin * L;
      T* rows = padded.get() + ((h - first_head) * N + begin) * row;
      kernels.product(end - begin, row, d, d_made.get() + h * d * C + e * y.padded_N + begin, 1, C, values + h * d * row,
                      row, rows, row, false);
      copy_rows(end - begin, L, rows, row, d_o + of, L);
      std::fill_n(rows, (end - begin) * row, T(0));
      copy_rows(end - begin, L, o + of, L, rows, row);
    });
    for_rows_of_heads(first_head, together, d, N * d * row, team, [&](int64_t h, int64_t begin, int64_t end) {
      const int64_t r = h * d + begin;
      kernels.product(end - begin, row, N, d_made.get() + r * C + e * y.padded_N, C, 1,
                      padded.get() + (h - first_head) * N * row, row, d_values + r * row, row, !begins || e > 0);
    });
  }
}

}  // namespace

template <class T>
int64_t grid_cross_attention_rest(const GridCrossAttention<T>& call) {
  return Sides<T>(call).rest();
}

template <class T>
void grid_cross_attention_forward(const GridCrossAttention<T>& call, T* y, const GridCrossAttentionSaved<T>& saved,
                                  const Parallel& parallel) {
  const Sides<T> sides(call);
  sides.tables(saved.rest, Team{&parallel});
  for_calls(sides.x.chunks(), sides.work, parallel,
            [&](int64_t chunk, Team team) { sides.queries(chunk, saved.rest, saved.q, team); });
  if (sides.has_axes()) {
    grid_attention_forward<T>(sides.attention(saved.q), {saved.o, saved.lse, saved.kept, nullptr}, parallel);
  } else {
    const auto in = sides.attention_to_tokens(saved.q);
    cross_attention_forward<T>(in, dense_outputs(in, saved.o), saved.lse, nullptr, parallel);
  }
  for_calls(sides.y.chunks(), sides.work, parallel,
            [&](int64_t chunk, Team team) { sides.results(chunk, saved, y, team); });
}

template <class T>
void grid_cross_attention_backward(const GridCrossAttention<T>& call, const T* d_y,
                                   const GridCrossAttentionSaved<T>& saved, T* d_x,
                                   const GridCrossAttentionParameters<T>& gradients, const Parallel& parallel) {
  const Sides<T> sides(call);
  const int64_t B = call.batch, N = sides.N, D = sides.D, I = sides.I, rows = sides.H * N * sides.L, row = sides.row;
  const Aligned<T> d_o(B * rows), d_q(B * rows), d_tables(sides.tables_size), d_kept(saved.kept ? B * sides.H * N : 0);
  const Aligned<T> of_results = sum_chunks<T>(
      sides.y.chunks(), sides.result_sums(), sides.work, parallel, [&](int64_t chunk, T* sums, bool begins, Team team) {
        sides.results_backward(chunk, saved, d_y, d_o.get(), d_kept.get(), sums, begins, team);
      });
  if (sides.has_axes()) {
    grid_attention_backward<T>(sides.attention(saved.q), {saved.o, saved.lse, saved.kept, nullptr},
                               {d_o.get(), nullptr, saved.kept ? d_kept.get() : nullptr}, d_q.get(), nullptr, nullptr,
                               parallel);
  } else {
    const auto in = sides.attention_to_tokens(saved.q);
    const HeadMatrix<T> none{};
    cross_attention_backward<T>(in, dense_outputs<const T>(in, saved.o), saved.lse, nullptr,
                                dense_outputs<const T>(in, d_o.get()), nullptr, dense_queries(in, d_q.get()), none, none,
                                parallel);
    clear_constants(in, d_q.get(), none);
  }
  const bool shared = call.x_batch == 1;
  const Aligned<T> summed(shared ? rows : 0), stream(shared ? N * D : 0);
  if (shared) {
    sum_batch(B, rows, d_q.get(), summed.get());
    sum_batch(B, N * D, d_y, stream.get());
  }
  const Aligned<T> of_queries = sum_chunks<T>(
      sides.x.chunks(), sides.query_sums(), sides.work, parallel, [&](int64_t chunk, T* sums, bool begins, Team team) {
        sides.queries_backward(chunk, saved.rest, shared ? summed.get() : d_q.get(), shared ? stream.get() : d_y, d_x,
                               sums, begins, team);
      });
  const T *from = of_queries.get(), *from_results = of_results.get();
  const int64_t wide = sides.x.padded(D), wide_inner = sides.x.padded(I);
  copy_rows(I, D, from, wide, gradients.to_q, D);
  std::copy_n(from += I * wide, D, gradients.norm_weight);
  std::copy_n(from += D, D, gradients.norm_bias);
  std::copy_n(from += D, I * row, d_tables.get());
  copy_rows(D, I, from_results, wide_inner, gradients.to_out, I);
  std::copy_n(from_results += D * wide_inner, D, gradients.to_out_bias);
  std::copy_n(from_results += D, I * row + I, d_tables.get() + I * row);
  sides.tables_backward(d_tables.get(), gradients, Team{&parallel});
}

#define PF_INSTANTIATE(T)                                                                                           \
  template int64_t grid_cross_attention_rest<T>(const GridCrossAttention<T>&);                                      \
  template void grid_cross_attention_forward<T>(const GridCrossAttention<T>&, T*, const GridCrossAttentionSaved<T>&, \
                                                const Parallel&);                                                   \
  template void grid_cross_attention_backward<T>(const GridCrossAttention<T>&, const T*,                            \
                                                 const GridCrossAttentionSaved<T>&, T*,                             \
                                                 const GridCrossAttentionParameters<T>&, const Parallel&);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace perceiver_fast
