// The Fourier projection tile by tile, forward and backward, for one instruction set.
//
// Batch elements that share positions share the positions' part of the product. The forward computes its sums once; the
// backward adds up the elements' gradients first and multiplies that sum once.
#include "fourier_encode.h"
#include "tile_gemm.h"
#include "transpose.h"

namespace perceiver_fast {
namespace PF_ISA {

template <class T>
constexpr int64_t kPanel = kGemmVectors * Simd<T>::lanes;
constexpr int64_t kDepth = 192;      // channels of a panel at a time: 24 KB, which stay in L1
constexpr int64_t kSumBlock = 64;    // channels that are added one after the other, the longest such sum
constexpr int64_t kFlushTiles = 32;  // tiles of which the weight's gradient is summed in T, then added in double

// Tokens of one tile, and how their channels are stored.
template <class T>
struct Tile : FourierChannels {
  int64_t set, first, count, width;    // set of positions, first token, tokens, tokens padded to vectors
  int64_t batch_begin, batch_end;      // batch elements at these positions

  Tile(const FourierProjectionInput<T>& in, bool normed, int64_t index) : FourierChannels(in, normed) {
    const int64_t tiles = (in.tokens + kFourierTile - 1) / kFourierTile, lanes = Simd<T>::lanes;
    set = index / tiles;
    first = index % tiles * kFourierTile;
    count = in.tokens - first < kFourierTile ? in.tokens - first : kFourierTile;
    width = (count + lanes - 1) / lanes * lanes;
    batch_begin = in.position_batch == in.batch ? set : 0;
    batch_end = in.position_batch == in.batch ? set + 1 : in.batch;
  }
  int64_t positions() const { return elements() * kFourierTile; }  // where the positions' codes begin
  bool shared() const { return batch_end - batch_begin != 1; }  // an empty batch too: its sum is zero
};

// columns[x][t] = rows[t][x], zero for t in [count, width).
template <class T>
void to_columns(const T* rows, int64_t row, const Tile<T>& tile, int64_t length, T* columns) {
  transpose(tile.count, length, rows, row, columns, kFourierTile);
  for (int64_t t = tile.count; t < tile.width; ++t)
    for (int64_t x = 0; x < length; ++x) columns[x * kFourierTile + t] = 0;
}

// total[t] = sum over channels of term(channel, t), in blocks so that no sum is long.
template <class T, class Term>
PF_INLINE void sum_channels(int64_t channels, int64_t width, T* total, Term term) {
  for (int64_t t = 0; t < width; ++t) total[t] = 0;
  for (int64_t begin = 0; begin < channels; begin += kSumBlock) {
    const int64_t end = begin + kSumBlock < channels ? begin + kSumBlock : channels;
    T part[kFourierTile] = {};
    for (int64_t c = begin; c < end; ++c)
      for (int64_t t = 0; t < width; ++t) part[t] += term(c * kFourierTile + t, t);
    for (int64_t t = 0; t < width; ++t) total[t] += part[t];
  }
}

// LayerNorm's statistics of the tokens of a tile, in two parts: positions once, then each batch element's features,
// which lose their mean, the shift, on the way.
template <class T>
struct Statistics {
  T position_mean[kFourierTile], position_square[kFourierTile];  // over the positions' channels; square about the mean
  T shift[kFourierTile], mean[kFourierTile];  // what the features lost; mean of all channels, less that

  void positions(const Tile<T>& tile, const T* codes) {
    codes += tile.positions();
    sum_channels(tile.axis_channels, tile.width, position_mean, [=](int64_t i, int64_t) { return codes[i]; });
    for (int64_t t = 0; t < tile.width && tile.axis_channels > 0; ++t) position_mean[t] /= T(tile.axis_channels);
    const T* middle = position_mean;
    sum_channels(tile.axis_channels, tile.width, position_square,
                 [=](int64_t i, int64_t t) { return (codes[i] - middle[t]) * (codes[i] - middle[t]); });
  }

  // Takes their mean out of the features, and stores it as the channel after them if there is one. What rounding leaves
  // of it counts as features do; without positions it is taken out, too, as the deviations of a token far from zero may
  // be no larger.
  void centre(const Tile<T>& tile, T* codes) {
    // Sums of large numbers could overflow, so their terms are divided first.
    const T each = T(1) / T(tile.features > 0 ? tile.features : 1);
    const T of_features = T(tile.features) / T(tile.token()), of_positions = T(tile.axis_channels) / T(tile.token());
    sum_channels(tile.features, tile.width, shift, [=](int64_t i, int64_t) { return codes[i] * each; });
    const T* s = shift;
    sum_channels(tile.features, tile.width, mean, [=](int64_t i, int64_t t) { return (codes[i] -= s[t]) * each; });
    if (tile.axis_channels == 0) {
      for (int64_t f = 0; f < tile.features; ++f)
        for (int64_t t = 0; t < tile.width; ++t) codes[f * kFourierTile + t] -= mean[t];
      for (int64_t t = 0; t < tile.width; ++t) mean[t] = 0;
      return;
    }
    for (int64_t t = 0; t < tile.width; ++t) mean[t] = mean[t] * of_features + (position_mean[t] - s[t]) * of_positions;
    if (tile.has_shift) std::memcpy(codes + tile.features * kFourierTile, shift, sizeof(T) * tile.width);
  }

  // After centre().
  void scale(const Tile<T>& tile, const T* codes, double eps, T* scale) const {
    const T* mu = mean;
    T square[kFourierTile];
    sum_channels(tile.features, tile.width, square,
                 [=](int64_t i, int64_t t) { return (codes[i] - mu[t]) * (codes[i] - mu[t]); });
    for (int64_t t = 0; t < tile.count; ++t) {
      const T off = position_mean[t] - shift[t] - mu[t];
      const T sum = square[t] + (position_square[t] + T(tile.axis_channels) * off * off);
      scale[t] = T(1 / __builtin_sqrt(double(sum) / double(tile.token()) + eps));
    }
  }
};

// sums [count][row] = or += the part of z weight that channels [begin, end) make.
template <class T>
void project(const FourierForward<T>& call, const Tile<T>& tile, int64_t begin, int64_t end, bool add, T* sums) {
  for (int64_t c = begin; c < end; c += kDepth, add = true) {
    const int64_t depth = end - c < kDepth ? end - c : kDepth;
    const T* codes = call.codes + c * kFourierTile;
    for (int64_t x = 0; x < call.row; x += kPanel<T>) {
      const int64_t columns = call.row - x < kPanel<T> ? call.row - x : kPanel<T>;
      const T* panel = call.panels + x * tile.stored() + c * kPanel<T>;
      if (add)
        tile_gemm<T, true>(tile.count, columns, depth, codes, 1, kFourierTile, panel, kPanel<T>, sums + x, call.row);
      else
        tile_gemm<T, false>(tile.count, columns, depth, codes, 1, kFourierTile, panel, kPanel<T>, sums + x, call.row);
    }
  }
}

template <class T>
void forward(const FourierForward<T>& call, int64_t tile_begin, int64_t tile_end) {
  const FourierProjectionInput<T>& in = call.in;
  const int64_t F = in.features, D = in.outputs;
  const bool normed = call.scale != nullptr;
  for (int64_t index = tile_begin; index < tile_end; ++index) {
    const Tile<T> tile(in, normed, index);
    Statistics<T> statistics;
    encode_positions(in, in.coords + (tile.set * in.tokens + tile.first) * in.axes, tile.count, tile.width,
                     call.codes + tile.positions());
    if (normed) statistics.positions(tile, call.codes);
    T* positions = tile.shared() ? call.base : call.sums;
    project(call, tile, tile.elements(), tile.stored(), false, positions);
    for (int64_t b = tile.batch_begin; b < tile.batch_end; ++b) {
      const int64_t token = b * in.tokens + tile.first;
      if (tile.shared()) std::memcpy(call.sums, positions, sizeof(T) * tile.count * call.row);
      if (F > 0) to_columns(in.feat + token * F, F, tile, F, call.codes);
      if (normed) {
        statistics.centre(tile, call.codes);
        statistics.scale(tile, call.codes, call.eps, call.scale + token);
      }
      if (F > 0) project(call, tile, 0, tile.elements(), tile.axis_channels > 0, call.sums);
      for (int64_t t = 0; t < tile.count; ++t) {
        const T r = normed ? call.scale[token + t] : T(1);
        const T* sums = call.sums + t * call.row;
        T* out = call.out + (token + t) * D;
        // A token whose variance overflows has the scale 0, and is 0, also where its sums overflow.
        for (int64_t x = 0; x < D; ++x) out[x] = (r == 0 ? T(0) : r * sums[x]) + call.bias[x];
      }
    }
  }
}

// Gradient of one batch element's raw channels, in codes' place d_codes, and what its scale adds to the positions'
// gradient: factor * (z - mean), summed over batch elements as factor and factor * mean.
template <class T>
void feature_gradient(const FourierBackward<T>& call, const Tile<T>& tile, int64_t b, const Statistics<T>& statistics,
                      T* factor_sum, T* factor_mean_sum) {
  const FourierProjectionInput<T>& in = call.in;
  const int64_t F = in.features, D = in.outputs, width = tile.width, token = b * in.tokens + tile.first;
  const T *codes = call.codes, *d_codes = call.d_codes, *grad = call.grad_columns, *projected = call.projected;
  if (F > 0)
    tile_gemm<T, false>(tile.elements(), width, D, call.weight, D, 1, grad, kFourierTile, call.d_codes, kFourierTile);
  if (call.scale != nullptr) {
    T slope[kFourierTile], part[kFourierTile], factor[kFourierTile];  // slope: r dr
    sum_channels(tile.elements(), width, slope, [=](int64_t i, int64_t) { return codes[i] * d_codes[i]; });
    if (tile.shared()) {
      sum_channels(D, width, part, [=](int64_t i, int64_t) { return grad[i] * projected[i]; });
    } else {
      const T *position = codes + tile.positions(), *d_position = d_codes + tile.positions();
      sum_channels(tile.axis_channels, width, part, [=](int64_t i, int64_t) { return position[i] * d_position[i]; });
    }
    for (int64_t t = 0; t < width; ++t) {
      const T r = t < tile.count ? call.scale[token + t] : T(0);
      factor[t] = -r * r * (slope[t] + part[t]) / T(tile.token());
      factor_sum[t] += factor[t];
      factor_mean_sum[t] += factor[t] * (statistics.mean[t] + statistics.shift[t]);
    }
    for (int64_t f = 0; f < F; ++f)
      for (int64_t t = 0; t < width; ++t)
        call.d_codes[f * kFourierTile + t] += factor[t] * (codes[f * kFourierTile + t] - statistics.mean[t]);
  }
  if (F > 0) transpose(F, tile.count, d_codes, kFourierTile, call.dfeat + token * F, F);
}

// One tile's gradients: of the weight, added to dweight_short, and with dcoords those of the tokens.
template <class T>
void backward_tile(const FourierBackward<T>& call, const Tile<T>& tile) {
  const FourierProjectionInput<T>& in = call.in;
  const int64_t F = in.features, D = in.outputs, row = call.row, count = tile.count, width = tile.width;
  const int64_t elements = tile.elements();
  const bool tokens = call.dcoords != nullptr, normed = call.scale != nullptr;
  const int64_t position = (tile.set * in.tokens + tile.first) * in.axes;
  T *codes = call.codes + tile.positions(), *d_codes = call.d_codes + tile.positions();
  const T* weight = call.weight + elements * D;
  Statistics<T> statistics;
  encode_positions(in, in.coords + position, count, width, codes);
  if (normed) statistics.positions(tile, call.codes);
  if (tokens && normed && tile.shared())
    tile_gemm<T, false>(D, width, tile.axis_channels, weight, 1, D, codes, kFourierTile, call.projected, kFourierTile);
  T factor_sum[kFourierTile] = {}, factor_mean_sum[kFourierTile] = {};
  T* sum = tile.shared() ? call.grad_sum : call.grad;
  for (int64_t i = 0; tile.shared() && i < count * row; ++i) sum[i] = 0;
  for (int64_t b = tile.batch_begin; b < tile.batch_end; ++b) {
    const int64_t token = b * in.tokens + tile.first;
    for (int64_t t = 0; t < count; ++t) {
      const T r = normed ? call.scale[token + t] : T(1);
      const T* d_out = call.d_out + (token + t) * D;
      T* grad = call.grad + t * row;
      for (int64_t x = 0; x < D; ++x) grad[x] = r * d_out[x];
      for (int64_t x = D; x < row; ++x) grad[x] = 0;
    }
    if (F > 0) to_columns(in.feat + token * F, F, tile, F, call.codes);
    if (normed) statistics.centre(tile, call.codes);
    if (F > 0)
      tile_gemm<T, true>(elements, row, count, call.codes, kFourierTile, 1, call.grad, row, call.dweight_short, row);
    for (int64_t i = 0; tile.shared() && i < count * row; ++i) sum[i] += call.grad[i];
    if (!tokens) continue;
    to_columns(call.grad, row, tile, D, call.grad_columns);
    if (!tile.shared())
      tile_gemm<T, false>(tile.axis_channels, width, D, weight, D, 1, call.grad_columns, kFourierTile, d_codes,
                          kFourierTile);
    feature_gradient(call, tile, b, statistics, factor_sum, factor_mean_sum);
  }
  tile_gemm<T, true>(tile.axis_channels, row, count, codes, kFourierTile, 1, sum, row,
                     call.dweight_short + elements * row, row);
  if (!tokens) return;
  if (tile.shared()) {
    to_columns(sum, row, tile, D, call.grad_columns);
    tile_gemm<T, false>(tile.axis_channels, width, D, weight, D, 1, call.grad_columns, kFourierTile, d_codes,
                        kFourierTile);
  }
  for (int64_t c = 0; normed && c < tile.axis_channels; ++c)
    for (int64_t t = 0; t < width; ++t)
      d_codes[c * kFourierTile + t] += factor_sum[t] * codes[c * kFourierTile + t] - factor_mean_sum[t];
  position_gradient(in, codes, d_codes, count, width, call.dcoords + position);
}

template <class T>
void backward(const FourierBackward<T>& call, int64_t tile_begin, int64_t tile_end) {
  const bool normed = call.scale != nullptr;
  const int64_t size = FourierChannels(call.in, normed).stored() * call.row;
  for (int64_t begin = tile_begin; begin < tile_end; begin += kFlushTiles) {
    const int64_t end = begin + kFlushTiles < tile_end ? begin + kFlushTiles : tile_end;
    for (int64_t i = 0; i < size; ++i) call.dweight_short[i] = 0;
    for (int64_t index = begin; index < end; ++index) backward_tile(call, Tile<T>(call.in, normed, index));
    for (int64_t i = 0; i < size; ++i) call.dweight[i] += call.dweight_short[i];
  }
}

template <class T>
const FourierProjectionKernels<T>& fourier_projection_table() {
  static constexpr FourierProjectionKernels<T> table{Simd<T>::lanes, int(kPanel<T>), forward<T>, backward<T>};
  return table;
}
template const FourierProjectionKernels<float>& fourier_projection_table<float>();
template const FourierProjectionKernels<double>& fourier_projection_table<double>();

}  // namespace PF_ISA
}  // namespace perceiver_fast
