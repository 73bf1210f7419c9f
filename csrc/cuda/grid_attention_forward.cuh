// Sums of grid attention over a split of the rows and 32 columns, for 128 queries; see perceiver_fast/ops/grid_attention.py
// for the maths, and kernels/grid_attention.py for the sums' layouts, for their merge and for the shift.
#pragma once

#include "grid_attention_tokens.cuh"

namespace perceiver_fast {

constexpr float kLeastTotal = 0x1p-60f, kMostTotal = 0x1p100f;  // beyond, rows are taken again with a shift

// Four lanes have a query together.
inline __device__ float quad_maximum(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Sums go by column to [splits, B, N, padded], by row to [column blocks, B, rows, N], by channel, then of the weights, an
// entry that is left out, and the shift to [splits, column blocks, B, F + 3, N].
//
// Registers: the tile's table of columns and its sums by column, 32 each. A weight costs one exponential, about two
// other operations and a quarter of three words from shared memory.
template <int F, bool kFloat16>
__global__ void __launch_bounds__(kThreads, kForwardBlocks) grid_attention_forward_kernel(GridCall call, GridSums out) {
  using Tokens = TokenChunk<F, kFloat16>;
  constexpr int tiles = kTileColumns / 8, group = Tokens::group;
  __shared__ Tokens tokens;
  __shared__ QueryChunk rows;
  const TilePlace at(call);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const auto query = [&](int n) {
    return Query{call.q + at.b * call.q_batch + min(at.n0 + n, call.queries - 1) * call.q_row, 1.0f};
  };
  const QueryTerms<F, typename Tokens::Terms> terms(rows, query);
  const RowReader<F, kFloat16> reader(tokens);
  const RowSums<F, group> by_row(call, at, out.rows);
  float table[2][tiles][4], shift[4] = {0, 0, 0, 0};
#pragma unroll
  for (int k = 0; k < 4; ++k) load_table<F>(table[k / 2], k % 2, call, at, query(threadIdx.x - lane + g + 8 * k));
  const auto fill = [&](int i0) {
    const typename Tokens::Raw raw(call, at, i0);
    const QueryChunk::Raw raw_rows(query(threadIdx.x), F, call.rows, i0);
    __syncthreads();
    tokens.fill(raw);
    rows.fill(raw_rows, kHole);
    __syncthreads();
  };

  for (;;) {  // once, but for extreme logits
    float sums[2][tiles][4] = {}, acc[2][4] = {};
    for (int i0 = at.first; i0 < at.last; i0 += kChunk) {
      fill(i0);
#pragma unroll 1
      for (int start = 0; start < kChunk; start += group) {
#pragma unroll 1
        for (int i = start; i < start + group; ++i) {
          uint32_t a[2][4];
#pragma unroll
          for (int m = 0; m < 2; ++m) terms.load(a[m], m, i);
#pragma unroll
          for (int u = 0; u < tiles; u += 2) {
            const SixteenTokens sixteen(reader, i, u / 2);
            const auto values = reader.values(i, u / 2);
            Weights<kFloat16> weights[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
              for (int m = 0; m < 2; ++m) {
                float s[4];
                sixteen.multiply(s, a[m], h, table[m][u + h]);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                  const float scale = sixteen.scale(h, c);
                  s[c] = weights[m].kept(exp2_approx(s[c] * scale - shift[2 * m + c / 2]));
                  sums[m][u + h][c] += s[c] * scale;
                }
                weights[m].put(h, s);
              }
            }
#pragma unroll
            for (int m = 0; m < 2; ++m) weights[m].add(acc[m], values);
          }
        }
        by_row.flush(call, acc, i0 + start);
      }
    }
    float total[4];
    bool good = true;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      total[k] = __shfl_sync(0xffffffffu, acc[k / 2][k % 2 * 2 + F % 2], lane - t + F / 2);
      good &= total[k] >= kLeastTotal && total[k] <= kMostTotal;
    }
    const bool again = __float_as_uint(shift[0]) != 0;  // which needs no register of its own
    if (again || !__syncthreads_or(!good)) {
      const TilePlace place(call);
      const int n0 = place.n0 + threadIdx.x - lane + g;  // the lane has queries n0, n0 + 8, n0 + 16 and n0 + 24
      store_sums<F>(call, sums, acc, out, F + 3);
#pragma unroll
      for (int k = 0; k < 4; ++k)  // of nothing but holes there is no maximum
        if (t == 0 && n0 + 8 * k < call.queries)
          out.others[place.other(call, F + 3, F + 2, n0 + 8 * k)] = total[k] == 0 ? -INFINITY : shift[k];
      return;
    }
    float most[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    for (int i0 = at.first; i0 < at.last; i0 += kChunk) {
      fill(i0);
#pragma unroll 1
      for (int i = 0; i < kChunk; ++i)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          uint32_t a[4];
          terms.load(a, m, i);
#pragma unroll
          for (int u = 0; u < tiles; ++u) {
            const SixteenTokens sixteen(reader, i, u / 2);
            float s[4];
            sixteen.multiply(s, a, u % 2, table[m][u]);
#pragma unroll
            for (int c = 0; c < 4; ++c)
              most[2 * m + c / 2] = fmaxf(most[2 * m + c / 2], s[c] * sixteen.scale(u % 2, c));
          }
        }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      most[k] = quad_maximum(most[k]);
      shift[k] = most[k] > kHole / 2 && most[k] != 0 ? most[k] : -0.0f;  // never +0: these rows are taken again
    }
  }
}

template <class Launch>
void grid_attention_forward(const Launch& launch, const GridCall& call, int features, bool float16,
                            const GridSums& out) {
  const dim3 grid(unsigned(call.blocks()));
  if (float16) {
    if (features == 1) launch(grid_attention_forward_kernel<1, true>, grid, call, out);
    if (features == 2) launch(grid_attention_forward_kernel<2, true>, grid, call, out);
    if (features == 3) launch(grid_attention_forward_kernel<3, true>, grid, call, out);
    return;
  }
  if (features == 1) launch(grid_attention_forward_kernel<1, false>, grid, call, out);
  if (features == 2) launch(grid_attention_forward_kernel<2, false>, grid, call, out);
  if (features == 3) launch(grid_attention_forward_kernel<3, false>, grid, call, out);
  if (features == 4) launch(grid_attention_forward_kernel<4, false>, grid, call, out);
}

}  // namespace perceiver_fast
