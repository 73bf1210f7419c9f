// Self-attention among latents that are packed columns (latent_columns.h): head by head, and of a head's queries so many
// at a time that their weights stay in cache.
//
// Vectors of an element's last queries may reach into the columns of the next one. What is computed there is nobody's: it
// is left in the room, from which an element's own columns are copied.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "latent_columns.h"

namespace perceiver_fast {

constexpr int64_t kQueries = 96;  // at a time; rows of so many floats fall into half of the first-level cache's sets

template <class T>
class LatentAttention {
 public:
  LatentAttention(const LatentColumns<T>& latents, int64_t heads, int64_t inner, double scale, const Dropout& dropout)
      : latents_(latents),
        kernels_(latents.kernels),
        heads_(heads),
        inner_(inner),
        d_(inner / heads),
        scale_(scale),
        dropout_(dropout),
        token_hashes_(dropout ? latents.N : 0) {
    for (size_t m = 0; m < token_hashes_.size(); ++m) token_hashes_[m] = dropout.token_hash(int64_t(m));
  }

  // o [I, C] from q, k and v [3 I, C] of a chunk. `row0` is the index of its first query over batch, heads and queries, for
  // dropout. Unless `most` is null, most and the sums behind it [2, C] are those of the softmax of the only head.
  void forward(int64_t chunk, const T* qkv, T* o, Team team, int64_t row0 = 0, T* most = nullptr) const {
    const int64_t C = latents_.columns(chunk), part = inner_ * C;
    for_heads(chunk, team, 2, [&](int64_t at, int64_t row, const Room& room) {
      for_queries([&](int64_t first, int64_t count) {
        weigh(C, qkv + at + first, qkv + part + at, count, room, most ? most + first : nullptr);
        drop(row0 + row + first, count, room.weights, room.weights, room);
        write(C, count, qkv + 2 * part + at, room.weights, o + at + first, room);
      });
    });
    clear_rest(chunk, inner_, o);
  }

  // The gradients of q, k and v [3 I, C] from that of o; and o once more, unless it is null. d_lse [C] is the gradient of the
  // only head's log-sum-exp, or null.
  void backward(int64_t chunk, const T* qkv, const T* d_o, T* d_qkv, T* o, Team team, int64_t row0 = 0,
                const T* d_lse = nullptr) const {
    const int64_t C = latents_.columns(chunk), part = inner_ * C, N = latents_.N;
    for_heads(chunk, team, 5, [&](int64_t at, int64_t row, const Room& room) {
      const T *q = qkv + at, *k = q + part, *v = k + part;
      for_queries([&](int64_t first, int64_t count) {
        const int64_t wide = latents_.padded(count);
        weigh(C, q + first, k, count, room);
        const T* kept = drop(row0 + row + first, count, room.weights, room.d_weights, room);
        if (o) write(C, count, v, kept, o + at + first, room);
        add_to_tokens(C, d_o + at + first, count, kept, room.d_v, first > 0, room);
        kernels_.product(N, wide, d_, v, 1, C, d_o + at + first, C, room.d_weights, wide, false);
        drop(row0 + row + first, count, room.d_weights, room.d_weights, room);
        kernels_.softmax_backward(N, wide, room.weights, room.d_weights, scale_, d_lse ? d_lse + first : nullptr);
        write(C, count, k, room.d_weights, d_qkv + at + first, room);
        add_to_tokens(C, q + first, count, room.d_weights, room.d_k, first > 0, room);
      });
      copy_rows(d_, N, room.d_k, latents_.padded_N, d_qkv + part + at, C);
      copy_rows(d_, N, room.d_v, latents_.padded_N, d_qkv + 2 * part + at, C);
    });
    if (o) clear_rest(chunk, inner_, o);
    clear_rest(chunk, 3 * inner_, d_qkv);
  }

 private:
  struct Room {
    T *weights, *d_weights;  // [N, queries]
    T* turned;               // [queries, N], rows padded as are those of the next two
    T *d_k, *d_v;            // [d, N]
    T* written;              // [d, queries]
    typename HashLane<T>::type* hashes;  // [queries], of dropout
  };

  int64_t queries() const {
    const int64_t parts = (latents_.N + kQueries - 1) / kQueries;
    return latents_.padded((latents_.N + parts - 1) / parts);
  }

  // body(where the head's numbers begin in [I, C], its first query's index over batch and heads, room) for heads of so
  // many products.
  template <class Body>
  void for_heads(int64_t chunk, Team team, int64_t products, const Body& body) const {
    const int64_t N = latents_.N, Q = queries(), row = latents_.padded_N, C = latents_.columns(chunk);
    const int64_t heads = latents_.count(chunk) * heads_;
    team.run(heads, 1, heads * products * N * latents_.padded(N) * d_, [&](int64_t begin, int64_t end) {
      const Aligned<T> memory(2 * N * Q + Q * row + 2 * d_ * row + d_ * Q);
      const Aligned<typename HashLane<T>::type> hashes(Q);
      Room room;
      room.hashes = hashes.get();
      room.weights = memory.get();
      room.d_weights = room.weights + N * Q;
      room.turned = room.d_weights + N * Q;
      room.d_k = room.turned + Q * row;
      room.d_v = room.d_k + d_ * row;
      room.written = room.d_v + d_ * row;
      for (int64_t i = begin; i < end; ++i)
        body(i % heads_ * d_ * C + i / heads_ * N, (latents_.first(chunk) * heads_ + i) * N, room);
    });
  }

  // body(first, count) for parts of the queries.
  template <class Body>
  void for_queries(const Body& body) const {
    for (int64_t first = 0; first < latents_.N; first += queries()) body(first, std::min(queries(), latents_.N - first));
  }

  // Weights of `count` queries.
  void weigh(int64_t C, const T* q, const T* k, int64_t count, const Room& room, T* most = nullptr) const {
    const int64_t wide = latents_.padded(count);
    kernels_.product(latents_.N, wide, d_, k, 1, C, q, C, room.weights, wide, false);
    kernels_.softmax(latents_.N, wide, room.weights, scale_, most, most ? most + C : nullptr);
  }

  // `to` = the weights, or of their gradients what flows back, of those that dropout keeps; or without it what is given.
  const T* drop(int64_t row, int64_t count, const T* given, T* to, const Room& room) const {
    if (!dropout_) return given;
    const int64_t wide = latents_.padded(count);
    for (int64_t i = 0; i < wide; ++i) room.hashes[i] = dropout_.query_hash(row + i);
    kernels_.drop(latents_.N, wide, given, room.hashes, token_hashes_.data(), dropout_.threshold, T(dropout_.scale()), to);
    return to;
  }

  // to [d, count] = x [d, N] weights.
  void write(int64_t C, int64_t count, const T* x, const T* weights, T* to, const Room& room) const {
    const int64_t wide = latents_.padded(count);
    if (wide == count) return kernels_.product(d_, wide, latents_.N, x, C, 1, weights, wide, to, C, false);
    kernels_.product(d_, wide, latents_.N, x, C, 1, weights, wide, room.written, wide, false);
    copy_rows(d_, count, room.written, wide, to, C);
  }

  // to [d, N] = or += x [d, count] weights^T.
  void add_to_tokens(int64_t C, const T* x, int64_t count, const T* weights, T* to, bool adds, const Room& room) const {
    const int64_t N = latents_.N, row = latents_.padded_N;
    kernels_.transpose(N, count, weights, latents_.padded(count), room.turned, row);
    kernels_.product(d_, latents_.padded(N), count, x, C, 1, room.turned, row, to, row, adds);
  }

  // Columns behind the last element's.
  void clear_rest(int64_t chunk, int64_t rows, T* x) const {
    const int64_t C = latents_.columns(chunk), used = latents_.count(chunk) * latents_.N;
    if (used < C)
      for (int64_t r = 0; r < rows; ++r) std::fill_n(x + r * C + used, C - used, T(0));
  }

  const LatentColumns<T>& latents_;
  const LatentKernels<T>& kernels_;
  const int64_t heads_, inner_, d_;
  const double scale_;
  const Dropout dropout_;
  std::vector<uint32_t> token_hashes_;
};

}  // namespace perceiver_fast
