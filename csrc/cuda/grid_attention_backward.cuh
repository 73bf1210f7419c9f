// Sums of dS, the gradient by the logits, over a split of the rows and 32 columns, for 128 queries; see
// kernels/grid_attention_backward.py for the maths, the sums' layouts and their merge.
//
//   p = 2^(s - shift),    dS = p (r (d_column[n, j] + d_row[n, i] + d_g[n] . x) - delta[n])
//
// with the factor 2^(shift - lse) ln(2) in the gradients. Both bracketed sums are products with the tokens' keys.
#pragma once

#include "grid_attention_tokens.cuh"

namespace perceiver_fast {

struct GridGradients {
  const float* d_o;    // [B, N, F + rows + columns], dense
  const float* stats;  // [4, B N]: shift, factor but for ln(2), factor times delta
};

// Sums go by column to [splits, B, N, padded], by row to [column blocks, B, rows, N], by channel and over all tokens to
// [splits, column blocks, B, F + 1, N].
template <int F, bool kFloat16>
__global__ void __launch_bounds__(kThreads, 2)
    grid_attention_backward_kernel(GridCall call, GridGradients in, GridSums out) {
  using Tokens = TokenChunk<F, kFloat16>;
  constexpr int tiles = kTileColumns / 8, group = Tokens::group;
  __shared__ Tokens tokens;
  __shared__ QueryChunk rows, d_rows;
  const TilePlace at(call);
  const int lane = threadIdx.x % 32, g = lane / 4;
  const int64_t count = int64_t(call.batch) * call.queries;
  const auto inside = [&](int n) { return at.b * call.queries + min(at.n0 + n, call.queries - 1); };
  const auto query = [&](int n) {
    return Query{call.q + at.b * call.q_batch + min(at.n0 + n, call.queries - 1) * call.q_row, 1.0f};
  };
  const auto d_query = [&](int n) {
    constexpr float ln_2 = 0.693147180559945309f;
    const int64_t row = inside(n);
    return Query{in.d_o + row * (F + call.rows + call.columns), in.stats[count + row] * ln_2};
  };
  const QueryTerms<F, typename Tokens::Terms> terms(rows, query), d_terms(d_rows, d_query);
  const RowReader<F, kFloat16> reader(tokens);
  const RowSums<F, group> by_row(call, at, out.rows);
  float table[2][tiles][4], d_table[2][tiles][4], shift[4], delta[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int n = threadIdx.x - lane + g + 8 * k;
    load_table<F>(table[k / 2], k % 2, call, at, query(n));
    load_table<F>(d_table[k / 2], k % 2, call, at, d_query(n));
    shift[k] = in.stats[inside(n)], delta[k] = in.stats[2 * count + inside(n)];
  }
  float sums[2][tiles][4] = {}, acc[2][4] = {};
  for (int i0 = at.first; i0 < at.last; i0 += kChunk) {
    const typename Tokens::Raw raw(call, at, i0);
    const QueryChunk::Raw raw_rows(query(threadIdx.x), F, call.rows, i0), d_raw(d_query(threadIdx.x), F, call.rows, i0);
    __syncthreads();
    tokens.fill(raw);
    rows.fill(raw_rows, kHole), d_rows.fill(d_raw, 0.0f);
    __syncthreads();
#pragma unroll 1
    for (int start = 0; start < kChunk; start += group) {
#pragma unroll 1
      for (int i = start; i < start + group; ++i) {
        uint32_t a[2][4], d_a[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) terms.load(a[m], m, i), d_terms.load(d_a[m], m, i);
#pragma unroll
        for (int u = 0; u < tiles; u += 2) {
          const SixteenTokens sixteen(reader, i, u / 2);
          const auto values = reader.values(i, u / 2);
          Weights<kFloat16> gradients[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              float s[4], d_s[4];
              sixteen.multiply(s, a[m], h, table[m][u + h]);
              sixteen.multiply(d_s, d_a[m], h, d_table[m][u + h]);
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                const float scale = sixteen.scale(h, c);
                const float p = exp2_approx(s[c] * scale - shift[2 * m + c / 2]);
                d_s[c] = gradients[m].kept(p * (d_s[c] * scale - delta[2 * m + c / 2]));
                sums[m][u + h][c] += d_s[c] * scale;
              }
              gradients[m].put(h, d_s);
            }
          }
#pragma unroll
          for (int m = 0; m < 2; ++m) gradients[m].add(acc[m], values);
        }
      }
      by_row.flush(call, acc, i0 + start);
    }
  }
  store_sums<F>(call, sums, acc, out, F + 1);
}

template <class Launch>
void grid_attention_backward(const Launch& launch, const GridCall& call, int features, bool float16,
                             const GridGradients& in, const GridSums& out) {
  const dim3 grid(unsigned(call.blocks()));
  if (float16) {
    if (features == 1) launch(grid_attention_backward_kernel<1, true>, grid, call, in, out);
    if (features == 2) launch(grid_attention_backward_kernel<2, true>, grid, call, in, out);
    if (features == 3) launch(grid_attention_backward_kernel<3, true>, grid, call, in, out);
    return;
  }
  if (features == 1) launch(grid_attention_backward_kernel<1, false>, grid, call, in, out);
  if (features == 2) launch(grid_attention_backward_kernel<2, false>, grid, call, in, out);
  if (features == 3) launch(grid_attention_backward_kernel<3, false>, grid, call, in, out);
  if (features == 4) launch(grid_attention_backward_kernel<4, false>, grid, call, in, out);
}

}  // namespace perceiver_fast
