// Drivers of the Fourier projection: out = r (z W) + bias with codes z that exist a tile at a time, and its gradients.
//
// Forward: tiles of kFourierTile tokens are shared out to the threads. Memory: the weight twice more, by channels as
// they are stored and in panels, and for a thread a tile's codes and two tiles of sums.
//
// Backward: the tiles are cut into parts, one a thread at most. Each sums the weight's gradient over its tiles, in T
// over a few of them and then in double; the parts' sums are added up in order. Gradients of features and positions
// belong to one tile each. Memory: the weight's gradient twice for every part, kPartBytes in all at most (but always
// one part), and for a thread a tile's codes, gradients and their transposes.
#include "fourier_projection.h"

#include <algorithm>

#include "aligned.h"
#include "fourier_projection_tile.h"

namespace perceiver_fast {

namespace {

// Each part of the backward holds the weight's gradient twice. There are as many parts as this many bytes allow.
constexpr int64_t kPartBytes = int64_t(256) << 20;
constexpr int64_t kPartTiles = 4;  // a part with fewer tiles spends its time on clearing and adding its sums

template <class T>
struct Blocking {
  const FourierProjectionKernels<T>& kernels;
  FourierChannels channels;
  int64_t row, tiles;  // D padded to whole vectors, tiles over all sets of positions

  Blocking(const FourierProjectionInput<T>& in, bool normed)
      : kernels(fourier_projection_kernels<T>(active_isa())),
        channels(in, normed),
        row((in.outputs + kernels.lanes - 1) / kernels.lanes * kernels.lanes),
        tiles(in.position_batch * ((in.tokens + kFourierTile - 1) / kFourierTile)) {}
};

// The weight's rows for the channels as they are stored, [R][D]. Rounded, a centred weight's rows do not quite add up to
// zero, and a token's mean, features' and positions', times what they add up to is to be taken out: of the shift's row,
// for the features' share of the mean.
template <class T>
Aligned<T> stored_weight(const FourierProjectionInput<T>& in, const FourierChannels& channels) {
  const int64_t D = in.outputs, F = channels.features, P = channels.axis_channels;
  Aligned<T> weight(channels.stored() * D);
  std::copy_n(in.weight, F * D, weight.get());
  std::copy_n(in.weight + F * D, P * D, weight.get() + channels.elements() * D);
  for (int64_t x = 0; channels.has_shift && x < D; ++x) {
    double features = 0, positions = 0;
    for (int64_t c = 0; c < F; ++c) features += in.weight[c * D + x];
    for (int64_t c = F; c < F + P; ++c) positions += in.weight[c * D + x];
    weight.get()[F * D + x] = T((P * features - F * positions) / (F + P));
  }
  return weight;
}

// A stored weight in panels of columns, zeros beyond the last one.
template <class T>
Aligned<T> pack_panels(const T* weight, int64_t D, const Blocking<T>& blocking) {
  const int64_t width = blocking.kernels.panel, stored = blocking.channels.stored();
  Aligned<T> panels((blocking.row + width - 1) / width * width * stored);
  T* to = panels.get();
  for (int64_t x = 0; x < blocking.row; x += width)
    for (int64_t c = 0; c < stored; ++c, to += width) {
      const int64_t count = std::max<int64_t>(0, std::min(D - x, width));
      std::copy_n(weight + c * D + x, count, to);
      std::fill(to + count, to + width, T(0));
    }
  return panels;
}

}  // namespace

template <class T>
void fourier_projection_forward(const FourierProjectionInput<T>& in, const T* bias, double eps, T* out, T* scale,
                                const Parallel& parallel) {
  const Blocking<T> blocking(in, scale != nullptr);
  const Aligned<T> weight = stored_weight(in, blocking.channels);
  const Aligned<T> panels = pack_panels(weight.get(), in.outputs, blocking), padded_bias(blocking.row);
  std::fill_n(padded_bias.get(), blocking.row, T(0));
  if (bias != nullptr) std::copy_n(bias, in.outputs, padded_bias.get());
  parallel.run(blocking.tiles, [&](int64_t begin, int64_t end) {
    const Aligned<T> codes(blocking.channels.stored() * kFourierTile), sums(kFourierTile * blocking.row),
        base(kFourierTile * blocking.row);
    blocking.kernels.forward(
        {in, panels.get(), padded_bias.get(), blocking.row, eps, out, scale, codes.get(), sums.get(), base.get()},
        begin, end);
  });
}

template <class T>
void fourier_projection_backward(const FourierProjectionInput<T>& in, const T* scale, const T* d_out, T* dweight,
                                 T* dfeat, double* dcoords, const Parallel& parallel) {
  const Blocking<T> blocking(in, scale != nullptr);
  const FourierChannels& channels = blocking.channels;
  const Aligned<T> weight = stored_weight(in, channels);
  const int64_t size = channels.stored() * blocking.row, square = kFourierTile * blocking.row;
  const int64_t affordable = std::max<int64_t>(1, kPartBytes / (size * int64_t(sizeof(T) + sizeof(double))));
  const int64_t wanted = std::min<int64_t>(parallel.threads, blocking.tiles / kPartTiles);
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, affordable));
  const Aligned<double> totals(parts * size);
  parallel.run(parts, [&](int64_t begin, int64_t end) {
    const int64_t columns = dcoords == nullptr ? 0 : kFourierTile;
    const Aligned<T> sums(size), codes(channels.stored() * kFourierTile), grad(square), grad_sum(square);
    const Aligned<T> d_codes(channels.stored() * columns), grad_columns(in.outputs * columns),
        projected(in.outputs * columns);
    for (int64_t part = begin; part < end; ++part) {
      double* total = totals.get() + part * size;
      std::fill_n(total, size, 0.0);
      blocking.kernels.backward({in, weight.get(), blocking.row, scale, d_out, dfeat, dcoords, total, sums.get(),
                                 codes.get(), grad.get(), grad_sum.get(), d_codes.get(), grad_columns.get(),
                                 projected.get()},
                                blocking.tiles * part / parts, blocking.tiles * (part + 1) / parts);
    }
  });
  const auto total = [&](int64_t channel, int64_t x) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += totals.get()[part * size + channel * blocking.row + x];
    return sum;
  };
  // All rows are in the shift's: see stored_weight.
  const double F = double(channels.features), P = double(channels.axis_channels);
  parallel.run(channels.token(), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const bool position = c >= channels.features;
      const double share = !channels.has_shift ? 0 : (position ? -F : P) / (F + P);
      const int64_t stored = position ? c + channels.has_shift : c;
      for (int64_t x = 0; x < in.outputs; ++x)
        dweight[c * in.outputs + x] = T(total(stored, x) + (share == 0 ? 0 : share * total(channels.features, x)));
    }
  });
}

#define PF_INSTANTIATE(T)                                                                                         \
  template void fourier_projection_forward<T>(const FourierProjectionInput<T>&, const T*, double, T*, T*,         \
                                              const Parallel&);                                                   \
  template void fourier_projection_backward<T>(const FourierProjectionInput<T>&, const T*, const T*, T*, T*,      \
                                               double*, const Parallel&);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace perceiver_fast
