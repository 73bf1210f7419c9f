// Matrix products and transposes of tiles, for one instruction set. Small integers: every sum is exact.
#include "../../csrc/core/tile_gemm.h"
#include "../../csrc/core/transpose.h"
#include "check.h"

namespace perceiver_fast {
namespace PF_ISA {
namespace {

// c = w b or c += w b with w read as it lies or transposed; cells of c beyond the columns stay as they are.
template <class T, bool Accumulate>
void multiply(int64_t rows, int64_t columns, int64_t depth, bool transposed, int64_t pad) {
  const int64_t w_row = transposed ? 1 : depth + pad, w_step = transposed ? rows + pad : 1, stride = columns + pad;
  const int64_t last_row = rows > 0 ? (rows - 1) * stride + columns : 0;
  const Guarded<T> w((rows + pad) * (depth + pad), pad * sizeof(T)), b(depth * stride), c(last_row);
  Random random;
  for (int64_t i = 0; i < w.size(); ++i) w[i] = T(random.small());
  for (int64_t i = 0; i < b.size(); ++i) b[i] = T(random.small());
  for (int64_t i = 0; i < c.size(); ++i) c[i] = i % stride < columns && !Accumulate ? T(NAN) : T(i % 7);
  tile_gemm<T, Accumulate>(rows, columns, depth, w.data(), w_row, w_step, b.data(), stride, c.data(), stride);
  int64_t wrong = 0;
  for (int64_t i = 0; i < c.size(); ++i) {
    const int64_t row = i / stride, x = i % stride;
    T sum = Accumulate || x >= columns ? T(i % 7) : T(0);
    for (int64_t k = 0; x < columns && k < depth; ++k) sum += w[row * w_row + k * w_step] * b[k * stride + x];
    wrong += c[i] != sum;
  }
  CHECK(wrong == 0, "%d cells: %d rows, %d columns, depth %d, transposed %d, pad %d", int(wrong), int(rows),
        int(columns), int(depth), transposed, int(pad));
}

template <class T>
void products() {
  const int64_t depths[] = {0, 1, 2, 127, 128, 129, 257};
  for (int64_t rows = 0; rows <= kGemmRows + 4; ++rows)
    for (int64_t vectors = 1; vectors <= 2 * kGemmVectors + 1; vectors += 2)
      for (int64_t depth : depths)
        for (int64_t pad = 0; pad < 2; ++pad) {
          multiply<T, false>(rows, vectors * Simd<T>::lanes, depth, pad == 0, pad);
          multiply<T, true>(rows, vectors * Simd<T>::lanes, depth, pad != 0, pad);
        }
}

template <class T>
void transposes() {
  constexpr int64_t n = Simd<T>::lanes;
  for (int64_t rows = 1; rows <= 2 * n + 1; ++rows)
    for (int64_t columns = 1; columns <= 2 * n + 1; ++columns)
      for (int64_t pad = 0; pad < 2; ++pad) {
        const int64_t from_row = columns + pad, to_row = rows + pad;
        const Guarded<T> from((rows - 1) * from_row + columns), to((columns - 1) * to_row + rows);
        for (int64_t i = 0; i < from.size(); ++i) from[i] = T(i);
        for (int64_t i = 0; i < to.size(); ++i) to[i] = T(-1);
        transpose(rows, columns, from.data(), from_row, to.data(), to_row);
        int64_t wrong = 0;
        for (int64_t i = 0; i < to.size(); ++i)
          wrong += to[i] != (i % to_row < rows ? T(i % to_row * from_row + i / to_row) : T(-1));
        CHECK(wrong == 0, "%d cells of [%d, %d], pad %d", int(wrong), int(rows), int(columns), int(pad));
      }
}

}  // namespace

extern const Case tiles_cases[] = {{"products, float", products<float>},
                                   {"products, double", products<double>},
                                   {"transposes, float", transposes<float>},
                                   {"transposes, double", transposes<double>},
                                   {nullptr, nullptr}};

}  // namespace PF_ISA
}  // namespace perceiver_fast
