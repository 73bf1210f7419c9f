// Small matrix products on tiles that sit in cache, for one instruction set:
//
//   c[i][x] = sum_k w(i, k) b[k][x]        w(i, k) = w[i * w_row + k * w_step]
//
// Elements of w and b are numbers, or pairs of bfloat16 (pairs.h), of which a sum takes two numbers a step.
//
// Columns x run over vectors, and the elements of w are broadcast as they lie, so either a matrix (w_step = 1) or its
// transpose (w_row = 1) is read in place and nothing is packed. With AVX-512 eight rows of two vectors stay in
// registers: sixteen independent sums, more than two multiply-add units of latency four need, and ten loads for
// sixteen multiply-adds.
//
// An element's sum runs over k in order, whatever the block it falls into: two calls that compute the same product
// agree to the last bit. Every kGemmDepth steps a new sum begins at zero and is then added to what came before, since
// rounding grows with the length of a sum. BLAS libraries cut theirs too.
#pragma once

#include "pairs.h"
#include "simd.h"

namespace perceiver_fast {
namespace PF_ISA {

template <class E>
struct Element : Simd<E> {
  using T = E;
  using Row = typename Simd<E>::Vec;
  static PF_INLINE Row row(const E* p) { return Simd<E>::load(p); }
  static PF_INLINE Row every(const E* p) { return Simd<E>::set(*p); }
  static PF_INLINE Row multiply_add(Row a, Row b, Row sum) { return fma(a, b, sum); }
};
#if defined(__AVX512BF16__)
template <>
struct Element<Pair> : Simd<float> {
  using T = float;
  using Row = __m512bh;
  static PF_INLINE Row row(const Pair* p) { return (Row)_mm512_loadu_si512(p); }
  static PF_INLINE Row every(const Pair* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return (Row)_mm512_set1_epi32(pair);
  }
  static PF_INLINE Vec multiply_add(Row a, Row b, Vec sum) { return (Vec)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif

// Rows by vectors held in registers: AVX-512 has 32 of them, the others 16.
constexpr int kGemmRows = PF_VECTOR_BYTES == 64 ? 8 : 6;
constexpr int kGemmVectors = 2;
constexpr int64_t kGemmDepth = 128;

template <class E, int Rows, int Vectors, bool Accumulate>
PF_INLINE void tile_gemm_block(int64_t depth, const E* w, int64_t w_row, int64_t w_step, const E* b, int64_t b_row,
                               typename Element<E>::T* c, int64_t c_row) {
  using S = Element<E>;
  bool add = Accumulate;  // to what c holds; after the first kGemmDepth steps, in any case
  for (int64_t first = 0; first == 0 || first < depth; first += kGemmDepth, add = true) {
    const int64_t steps = depth - first < kGemmDepth ? depth - first : kGemmDepth;
    typename S::Vec sum[Rows][Vectors] = {};
    for (int64_t k = 0; k < steps; ++k, w += w_step, b += b_row) {
      typename S::Row row[Vectors];
      for (int v = 0; v < Vectors; ++v) row[v] = S::row(b + v * S::lanes);
      for (int i = 0; i < Rows; ++i) {
        const auto element = S::every(w + i * w_row);
        for (int v = 0; v < Vectors; ++v) sum[i][v] = S::multiply_add(element, row[v], sum[i][v]);
      }
    }
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < Vectors; ++v) {
        auto* at = c + i * c_row + v * S::lanes;
        S::store(at, add ? S::load(at) + sum[i][v] : sum[i][v]);
      }
  }
}

// `Rows` rows of c, strip by strip: their elements of w stay in the first-level cache, as b does when it is a tile.
template <class E, int Rows, bool Accumulate>
PF_INLINE void tile_gemm_rows(int64_t columns, int64_t depth, const E* w, int64_t w_row, int64_t w_step, const E* b,
                              int64_t b_row, typename Element<E>::T* c, int64_t c_row) {
  constexpr int64_t lanes = Element<E>::lanes, strip = kGemmVectors * lanes;
  int64_t x = 0;
  for (; x + strip <= columns; x += strip)
    tile_gemm_block<E, Rows, kGemmVectors, Accumulate>(depth, w, w_row, w_step, b + x, b_row, c + x, c_row);
  for (; x < columns; x += lanes)
    tile_gemm_block<E, Rows, 1, Accumulate>(depth, w, w_row, w_step, b + x, b_row, c + x, c_row);
}

// c = w b, or c += w b when Accumulate. `columns` is a multiple of the vector's lanes; b and c are row-major with
// rows b_row and c_row apart.
template <class E, bool Accumulate>
void tile_gemm(int64_t rows, int64_t columns, int64_t depth, const E* w, int64_t w_row, int64_t w_step, const E* b,
               int64_t b_row, typename Element<E>::T* c, int64_t c_row) {
  int64_t i = 0;
#define PF_ROWS(COUNT)                                                                                        \
  for (; i + COUNT <= rows; i += COUNT)                                                                       \
    tile_gemm_rows<E, COUNT, Accumulate>(columns, depth, w + i * w_row, w_row, w_step, b, b_row, c + i * c_row, c_row);
  PF_ROWS(kGemmRows)
  PF_ROWS(3)
  PF_ROWS(1)
#undef PF_ROWS
}

}  // namespace PF_ISA
}  // namespace perceiver_fast
