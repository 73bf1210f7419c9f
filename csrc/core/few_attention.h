// Attention among a few latents that exist as tensors: every head by itself, as columns (latent_attention.h), without the
// blocks, tiles and statistics of cross_attention.cpp, which are for more. On an AMD EPYC (Zen 4) 16 latents took half the
// time, 512 nine tenths.
#pragma once

#include <cmath>
#include <cstdint>

#include "aligned.h"
#include "cross_attention.h"
#include "latent_attention.h"

namespace perceiver_fast {

constexpr int64_t kFew = 64, kFewOfManyHeads = 512;  // latents
constexpr int64_t kManyHeads = 64;                      // over the batch: for all threads of most machines

template <class T>
class FewAttention {
 public:
  // Whether attention is of a few latents to one another. It depends on shapes alone.
  static bool takes(const CrossAttentionInput<T>& in) {
    if (in.mask != nullptr || in.inverted || in.queries != in.tokens || in.dim != in.dim_v) return false;
    return in.tokens > 0 && in.tokens <= (in.batch * in.heads >= kManyHeads ? kFewOfManyHeads : kFew);
  }

  explicit FewAttention(const CrossAttentionInput<T>& in)
      : in_(in),
        latents_(1, in.tokens, in.dim, true),
        attention_(latents_, 1, in.dim, in.scale, in.dropout),
        columns_(latents_.columns(0)),
        part_(in.dim * columns_) {}

  // o [B, H, N, d] and its log-sum-exp [B, H, N].
  void forward(const HeadMatrix<T>& o, double* lse, const Parallel& parallel) const {
    const int64_t N = in_.tokens;
    parallel.run(in_.batch * in_.heads, [&](int64_t begin, int64_t end) {
      const Aligned<T> memory(room(4)), statistics(2 * columns_);
      T *qkv = memory.get(), *made = qkv + 3 * part_, *most = statistics.get(), *sum = most + columns_;
      for (int64_t head = begin; head < end; ++head) {
        load(head, qkv);
        attention_.forward(0, qkv, made, Team{nullptr}, head * N, most);
        store(head, made, o);
        for (int64_t n = 0; n < N; ++n)
          lse[head * N + n] = std::log(double(sum[n])) + double(most[n]) * in_.scale;
      }
    });
  }

  // The gradients of q, k and v; d_lse may be null. A backward by other kernels would not do: rounding of large
  // logits that is not the same in forward and backward does not cancel.
  void backward(const HeadMatrix<const T>& d_o, const double* d_lse, const HeadMatrix<T>& dq, const HeadMatrix<T>& dk,
                const HeadMatrix<T>& dv, const Parallel& parallel) const {
    const int64_t N = in_.tokens;
    parallel.run(in_.batch * in_.heads, [&](int64_t begin, int64_t end) {
      const Aligned<T> memory(room(7)), of_lse(columns_);
      std::fill_n(of_lse.get(), columns_, T(0));
      T *qkv = memory.get(), *d_qkv = qkv + 3 * part_, *grad = qkv + 6 * part_;
      for (int64_t head = begin; head < end; ++head) {
        load(head, qkv);
        load(head, d_o, grad);
        for (int64_t n = 0; d_lse && n < N; ++n) of_lse.get()[n] = T(d_lse[head * N + n]);
        attention_.backward(0, qkv, grad, d_qkv, nullptr, Team{nullptr}, head * N, d_lse ? of_lse.get() : nullptr);
        store(head, d_qkv, dq);
        store(head, d_qkv + part_, dk);
        store(head, d_qkv + 2 * part_, dv);
      }
    });
  }

 private:
  // Numbers of so many [d, columns], and what a vector may read beyond the last.
  int64_t room(int64_t parts) const { return parts * part_ + latents_.padded(1); }

  // A head's q, k and v as columns.
  void load(int64_t head, T* qkv) const {
    for (const HeadMatrix<const T>* each : {&in_.q, &in_.k, &in_.v}) {
      load(head, *each, qkv);
      qkv += part_;
    }
  }
  void load(int64_t head, const HeadMatrix<const T>& from, T* columns) const {
    const T* rows = from.at(head / in_.heads, head % in_.heads, 0);
    latents_.kernels.transpose(in_.tokens, in_.dim, rows, from.row_stride, columns, columns_);
  }

  void store(int64_t head, const T* columns, const HeadMatrix<T>& to) const {
    if (to.data == nullptr) return;
    T* rows = to.at(head / in_.heads, head % in_.heads, 0);
    latents_.kernels.transpose(in_.dim, in_.tokens, columns, columns_, rows, to.row_stride);
  }

  const CrossAttentionInput<T>& in_;
  const LatentColumns<T> latents_;
  const LatentAttention<T> attention_;
  const int64_t columns_, part_;
};

}  // namespace perceiver_fast
