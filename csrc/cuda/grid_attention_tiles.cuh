// A block's tile of grid attention, and what it puts into shared memory of eight rows at a time.
//
// A block owns 128 queries x 32 columns and walks down the rows of a split. Its four warps have 32 queries each. A logit is
//
//   t = column[n, j] + row[n, i] + g[n] . x[i, j] + hole[i, j],    s = t r[i, j]
//
// of which a product with 16 terms gives all but the first, which it accumulates on:
//
//   terms    0 .. 11, see ChannelTerms            12        13 .. 15
//   query    g in three pieces of bf16            -2^100    row[n, i] in three pieces
//   token    x, once for every piece              hole      1
//
// So float32's digits are kept, and only terms 12 .. 15 of a query change from row to row: one word in two of four lanes.
// A second product sums weights times
//
//   value    x r (F columns)    1    r, in one of the next columns for each row of a group
#pragma once

#include "tensor_core.cuh"
#include "tile.cuh"

namespace perceiver_fast {

constexpr int kChunk = 8;              // rows between two barriers
constexpr int kTileQueries = 128, kTileColumns = 32;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kForwardBlocks = 2;  // on a multiprocessor: three would spill there
#else
constexpr int kForwardBlocks = 3;
#endif
constexpr float kHole = -0x1p100f;     // below all logits, and finite: no difference with it is NaN

// A vector of words that lie aligned.
template <class Vector, class T>
__device__ Vector read(const T* words) {
  return *reinterpret_cast<const Vector*>(words);
}

// A place in shared memory, computed once: not anew in every turn of a loop.
template <class T>
__device__ const T* settled(const T* words) {
#ifdef __CUDACC__
  unsigned at = __cvta_generic_to_shared(words);
  asm volatile("" : "+r"(at));
  words = static_cast<const T*>(__cvta_shared_to_generic(at));
#endif
  return words;
}

// One call. Masked tokens are holes, as is what lies beyond the last row or column.
struct GridCall {
  const float* q;         // [B, N, F + rows + columns], the last axis dense
  int64_t q_batch, q_row; // its strides; the first may be 0
  const uint16_t* feat;   // [B, rows, columns, F], bf16 or fp16
  const float* scale;     // [B, rows, columns]
  const uint8_t* mask;    // [B, rows, columns], 0 for masked tokens; or null
  int batch, queries, rows, columns;
  int padded;             // columns in memory of sums by column: a multiple of kTileColumns
  int splits, per_split;  // of the rows; a split is of whole chunks

  __host__ __device__ int query_blocks() const { return (queries + kTileQueries - 1) / kTileQueries; }
  __host__ __device__ int column_blocks() const { return (columns + kTileColumns - 1) / kTileColumns; }
  __host__ __device__ int64_t blocks() const { return int64_t(query_blocks()) * column_blocks() * splits * batch; }
};

// blockIdx.x, read again wherever it is asked for: what is computed from it need not wait in registers.
inline __device__ int block_index() {
#ifdef __CUDACC__
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
#else
  return blockIdx.x;
#endif
}

// Which tile is the block's. Blocks of queries follow each other first: neighbours read the same tokens.
struct TilePlace {
  int n0, j0, first, last;       // first query, column and row, and the row after the last
  int block, split;              // of columns, of rows
  int64_t b;

  __device__ explicit TilePlace(const GridCall& call) {
    const int queries = call.query_blocks(), columns = call.column_blocks();
    int rest = block_index();
    n0 = rest % queries * kTileQueries, rest /= queries;
    block = rest % columns, rest /= columns;
    split = rest % call.splits, b = rest / call.splits;
    j0 = block * kTileColumns;
    first = split * call.per_split, last = min(call.rows, first + call.per_split);
  }

  // Where sum c of `kinds` for query n lies in [splits, column blocks, B, kinds, N].
  __device__ int64_t other(const GridCall& call, int kinds, int c, int n) const {
    const int64_t part = (int64_t(split) * call.column_blocks() + block) * call.batch + b;
    return (part * kinds + c) * call.queries + n;
  }
};

// A query's channels, followed by its rows and its columns, times a factor.
struct Query {
  const float* channels;
  float factor;

  __device__ float operator[](int at) const { return channels[at] * factor; }
};

// Terms 8 .. 15 of a block's queries in a chunk.
struct QueryChunk {
  uint2 moving[kChunk][kTileQueries];  // terms 12, 13 and 14, 15
  uint2 apart[8];                      // puts what follows into the other banks
  uint2 fixed[kTileQueries];           // terms 8, 9 and 10, 11

  // A query's rows of a chunk in global memory. Those beyond the last are zeros: their tokens are holes.
  struct Raw {
    float row[kChunk];

    __device__ Raw(const Query& query, int features, int rows, int i0) {
      const Query here{query.channels + features + i0, query.factor};
#pragma unroll
      for (int i = 0; i < kChunk; ++i) row[i] = i < rows - i0 ? here[i] : 0.0f;
    }
  };

  // A thread makes its query's.
  __device__ void fill(const Raw& raw, float hole) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const Pieces row = Pieces::cut(raw.row[i]);
      moving[i][threadIdx.x] = {pack_exact(hole, row.first), pack_exact(row.second, row.third)};
    }
  }
};

// Terms k and k + 1 of a query's channels, k < 12.
template <int F, class Terms>
__device__ uint32_t channel_terms(const Query& query, int k) {
  const auto term = [&](int k) {
    const Pieces x = Pieces::rounded(k < Terms::count ? query[k % F] : 0.0f);
    const int piece = Terms::of_query(k);
    return piece == 0 ? x.first : piece == 1 ? x.second : x.third;
  };
  return pack_bf16(term(k), term(k + 1));
}

// A lane's words of the terms of its warp's 32 queries: two in registers, and two in shared memory that change with rows.
template <int F, class Terms>
struct QueryTerms {
  uint32_t early[2][2];  // terms 2t, 2t + 1 of queries g and g + 8 of either half
  const uint32_t* late;
  int step;  // bytes from row to row

  // Fills what is fixed of a chunk: barriers follow before it is read. `query(n)` is a query of the block's tile; those
  // beyond the last repeat it.
  template <class Find>
  __device__ QueryTerms(QueryChunk& chunk, const Find& query) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, n = threadIdx.x - lane + g;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) early[m][h] = channel_terms<F, Terms>(query(n + 16 * m + 8 * h), 2 * t);
    const Query own = query(threadIdx.x);
    chunk.fixed[threadIdx.x] = {channel_terms<F, Terms>(own, 8), channel_terms<F, Terms>(own, 10)};
    late = t < 2 ? &chunk.fixed[n].x + t : &chunk.moving[0][n].x + (t - 2);
    step = t < 2 ? 0 : sizeof(chunk.moving[0]);
  }

  // The first operand of row i of the chunk and half m of the queries.
  __device__ void load(uint32_t (&a)[4], int m, int i) const {
    const auto* words = reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(late) + i * step) + 32 * m;
    a[0] = early[m][0], a[1] = early[m][1], a[2] = words[0], a[3] = words[16];
  }
};

// A query's part of what a lane has of the table by column: rows g or, of `half` 1, g + 8. Columns beyond the last repeat
// it: their tokens are holes.
template <int F>
__device__ void load_table(float (&table)[kTileColumns / 8][4], int half, const GridCall& call, const TilePlace& at,
                           const Query& query) {
#pragma unroll
  for (int u = 0; u < kTileColumns / 8; ++u)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int j = at.j0 + 8 * u + threadIdx.x % 4 * 2 + c;
      table[u][2 * half + c] = query[F + call.rows + min(j, call.columns - 1)];
    }
}

// Where partial sums go; kernels say which.
struct GridSums {
  float *columns, *rows, *others;
};

// Writes a lane's sums by column, and of acc those by channel and over all tokens; `kinds` of the latter are there.
template <int F>
__device__ void store_sums(const GridCall& call, const float (&sums)[2][kTileColumns / 8][4],
                           const float (&acc)[2][4], const GridSums& out, int kinds) {
  const TilePlace at(call);
  const int lane = threadIdx.x % 32, t = lane % 4, n0 = at.n0 + threadIdx.x - lane + lane / 4;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int n = n0 + 8 * k;
    if (n >= call.queries) continue;
    float* by_column = out.columns + ((int64_t(at.split) * call.batch + at.b) * call.queries + n) * call.padded;
#pragma unroll
    for (int u = 0; u < kTileColumns / 8; ++u) {
      const float* pair = &sums[k / 2][u][k % 2 * 2];
      *reinterpret_cast<float2*>(by_column + at.j0 + 8 * u + 2 * t) = float2{pair[0], pair[1]};
    }
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (2 * t + c <= F) out.others[at.other(call, kinds, 2 * t + c, n)] = acc[k / 2][k % 2 * 2 + c];
  }
}

// Where a lane's sums by row go, which stand apart in columns of acc: [column blocks, B, rows, N].
template <int F, int group>
struct RowSums {
  float* at;  // of the first row of the lane's two, counted from a group's first, and of its first query
  int row, n;

  __device__ RowSums(const GridCall& call, const TilePlace& place, float* rows) {
    const int lane = threadIdx.x % 32;
    row = 2 * (lane % 4) - F - 1, n = place.n0 + threadIdx.x - lane + lane / 4;
    at = rows + ((place.block * int64_t(call.batch) + place.b) * call.rows + row) * call.queries + n;
  }

  // Writes the sums of the group that begins with row i, and takes them out.
  __device__ void flush(const GridCall& call, float (&acc)[2][4], int i) const {
    float* out = at + int64_t(i) * call.queries;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const bool mine = row + c >= 0 && row + c < group && i + row + c < call.rows;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float& sum = acc[k / 2][k % 2 * 2 + c];
        if (mine && n + 8 * k < call.queries) out[8 * k] = sum;
        sum = row + c >= 0 ? 0.0f : sum;
      }
      out += call.queries;
    }
  }
};

}  // namespace perceiver_fast
