// Drivers of latents through pre-normalised layers.
//
// A chunk of batch elements, as many as fill kColumns vector lanes with latents, goes through all layers before the next
// one does: what is between two products stays in cache, and every weight that is read multiplies a whole row of lanes.
// Matrices are [channels, columns], so that weights are read as they lie. An element's latents begin at a multiple of
// the vector's lanes; columns that are no latents begin as zeros, and their gradients are zeros.
//
// Threads share the chunks, or where these are few the rows of every product. Gradients of parameters are summed in
// parts that depend on the shape alone, so no bit depends on the number of threads.
// Memory: a chunk's matrices for each thread, and in the backward the parameters' gradients for each part.
#include "latent_layers.h"

#include <algorithm>
#include <cstring>

#include "aligned.h"

namespace perceiver_fast {

namespace {

constexpr int64_t kColumns = 64;
constexpr int64_t kShareWork = 1 << 19;   // multiply-adds of a thread's share at least
constexpr int64_t kPartChunks = 4;        // of a sum over chunks: its memory is filled and read once
constexpr int64_t kMostParts = 32;

// The threads that share a step; only the caller's where there is nothing to share it with.
struct Team {
  const Parallel* parallel;

  // body(begin, end) for [0, count), cut at multiples of `block`.
  template <class Body>
  void run(int64_t count, int64_t block, int64_t work, const Body& body) const {
    const int64_t blocks = (count + block - 1) / block;
    const int64_t shares = parallel == nullptr ? 1 : std::min({int64_t(parallel->threads), work / kShareWork, blocks});
    if (shares <= 1) return body(0, count);
    parallel->run(shares, [&](int64_t first, int64_t last) {
      body(blocks * first / shares * block, std::min(count, blocks * last / shares * block));
    });
  }
};

template <class T>
class Pass {
 public:
  explicit Pass(const LatentLayers<T>& call)
      : call_(call),
        kernels_(latent_layers_kernels<T>(active_isa())),
        N(call.latents),
        D(call.channels),
        padded_(padded(N)),
        group_(std::max<int64_t>(1, std::min(call.batch, kColumns / padded_))) {
    for (const auto& layer : call.layers) {
      inner_ = std::max(inner_, layer.inner);
      wide_ = std::max(wide_, (layer.heads > 0 ? 3 : 2) * layer.inner);
      most_ = std::max(most_, saved_of(layer));
      saved_ += saved_of(layer);
    }
  }

  int64_t chunks() const { return (call_.batch + group_ - 1) / group_; }
  int64_t saved() const { return saved_; }  // of a chunk

  // Multiply-adds of a chunk's forward.
  int64_t work() const {
    int64_t total = 0;
    for (const auto& layer : call_.layers) total += layer.inner * (D * (layer.heads > 0 ? 4 : 3) + 2 * N);
    return total * group_ * N;
  }

  // Of the chunk [first, last).
  void forward(int64_t first, int64_t last, const T* x_, T* y, T* saved, Team team) const;
  void backward(int64_t first, int64_t last, const T* d_y, const T* saved, T* d_x,
                const std::vector<LatentLayerParameters<T>>& sums, Team team) const;

  // Runs run(chunk, first element, end, team) for all chunks of [begin, end).
  template <class Run>
  void chunks_of(int64_t begin, int64_t end, const Run& run) const {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      run(chunk, chunk * group_, std::min(call_.batch, (chunk + 1) * group_));
  }

  // Gradients of a layer's parameters, their rows padded to whole vectors: how many numbers, and where each begins.
  int64_t gradients_of(const LatentLayer<T>& layer) const {
    return 3 * D + rows_of_first(layer) * padded(D) + (layer.heads > 0 ? 0 : 2 * layer.inner) + D * padded(layer.inner);
  }
  LatentLayerParameters<T> gradients_in(const LatentLayer<T>& layer, T* at) const {
    LatentLayerParameters<T> to;
    to.norm_weight = at;
    to.norm_bias = at + D;
    to.last_bias = at + 2 * D;
    to.first = at + 3 * D;
    to.second = to.first + (layer.heads > 0 ? layer.inner : rows_of_first(layer)) * padded(D);
    to.last = at + gradients_of(layer) - D * padded(layer.inner);
    return to;
  }
  // Adds a part of the gradients, or begins with it.
  void add_gradients(const LatentLayer<T>& layer, const LatentLayerParameters<T>& part,
                     const LatentLayerParameters<T>& to, bool begins) const {
    const int64_t I = layer.inner;
    add(1, D, D, part.norm_weight, to.norm_weight, begins);
    add(1, D, D, part.norm_bias, to.norm_bias, begins);
    add(1, D, D, part.last_bias, to.last_bias, begins);
    add(D, I, padded(I), part.last, to.last, begins);
    if (layer.heads > 0) {
      add(I, D, padded(D), part.first, to.first, begins);
      add(2 * I, D, padded(D), part.second, to.second, begins);
    } else {
      add(2 * I, D, padded(D), part.first, to.first, begins);
      add(1, 2 * I, 2 * I, part.second, to.second, begins);
    }
  }

 private:
  // To whole vectors of every instruction set, so that what is saved does not depend on it.
  static int64_t padded(int64_t n) {
    constexpr int64_t lanes = 64 / sizeof(T);
    return (n + lanes - 1) / lanes * lanes;
  }
  int64_t rows_of_first(const LatentLayer<T>& layer) const { return (layer.heads > 0 ? 3 : 2) * layer.inner; }

  // xhat, rstd, then of attention q, k, v, weights, and what they make; of a feed-forward h with its bias.
  int64_t saved_of(const LatentLayer<T>& layer) const {
    return (D + 1 + (layer.heads > 0 ? 4 * layer.inner + layer.heads * N : 2 * layer.inner)) * group_ * padded_;
  }

  static void add(int64_t rows, int64_t columns, int64_t from_row, const T* from, T* to, bool begins) {
    for (int64_t r = 0; r < rows; ++r, from += from_row, to += columns)
      for (int64_t c = 0; c < columns; ++c) to[c] = begins ? from[c] : to[c] + from[c];
  }

  // c [rows, columns] = w b, of dense b and c.
  void product(int64_t rows, int64_t columns, int64_t depth, const T* w, int64_t w_row, int64_t w_step, const T* b,
               T* c, Team team, bool accumulate = false) const {
    team.run(rows, 8, rows * columns * depth, [&](int64_t begin, int64_t end) {
      kernels_.product(end - begin, columns, depth, w + begin * w_row, w_row, w_step, b, columns,
                       c + begin * columns, columns, accumulate);
    });
  }
  // sums [rows, padded(channels)] += d a^T, of d [rows, columns] and a [channels, columns]; room is for a^T.
  void outer(int64_t rows, int64_t channels, int64_t columns, const T* d, const T* a, T* room, T* sums,
             Team team) const {
    const int64_t row = padded(channels);
    kernels_.transpose(channels, columns, a, columns, room, row);
    team.run(rows, 8, rows * columns * row, [&](int64_t begin, int64_t end) {
      kernels_.product(end - begin, row, columns, d + begin * columns, columns, 1, room, row, sums + begin * row, row,
                       true);
    });
  }

  // Elements [first, last) of [B, N, D] as columns, and back.
  void load(int64_t first, int64_t last, const T* from, T* to) const {
    const int64_t columns = (last - first) * padded_;
    if (padded_ != N) std::fill_n(to, D * columns, T(0));
    for (int64_t e = first; e < last; ++e)
      kernels_.transpose(N, D, from + e * N * D, D, to + (e - first) * padded_, columns);
  }
  void store(int64_t first, int64_t last, const T* from, T* to) const {
    const int64_t columns = (last - first) * padded_;
    for (int64_t e = first; e < last; ++e)
      kernels_.transpose(D, N, from + (e - first) * padded_, columns, to + e * N * D, D);
  }

  // body(where the head's channels begin in [I, columns], where its weights [N, columns] do, room for two of these).
  template <class Body>
  void heads(const LatentLayer<T>& layer, int64_t columns, Team team, const Body& body) const {
    const int64_t count = columns / padded_ * layer.heads, d = layer.inner / layer.heads;
    team.run(count, 1, count * N * padded_ * d * 2, [&](int64_t begin, int64_t end) {
      const Aligned<T> room(2 * N * padded_);
      for (int64_t i = begin; i < end; ++i)
        body(i % layer.heads * d * columns + i / layer.heads * padded_, i * N * padded_, room.get());
    });
  }
  void attend(const LatentLayer<T>& layer, int64_t columns, const T* qkv, T* weights, T* o, Team team) const;
  void attend_backward(const LatentLayer<T>& layer, int64_t columns, const T* qkv, const T* weights, const T* d_o,
                       T* d_qkv, Team team) const;

  const LatentLayers<T>& call_;
  const LatentLayersKernels<T>& kernels_;
  const int64_t N, D, padded_, group_;
  int64_t inner_ = 0, wide_ = 0, most_ = 0, saved_ = 0;  // the largest of all layers, and the sum
};

template <class T>
void Pass<T>::attend(const LatentLayer<T>& layer, int64_t C, const T* qkv, T* weights, T* o, Team team) const {
  const int64_t I = layer.inner, d = I / layer.heads;
  const T *k = qkv + I * C, *v = k + I * C;
  heads(layer, C, team, [&](int64_t at, int64_t at_weights, T*) {
    T* w = weights + at_weights;  // [tokens, queries]
    kernels_.product(N, padded_, d, k + at, 1, C, qkv + at, C, w, padded_, false);
    kernels_.softmax(N, padded_, w, layer.scale);
    kernels_.product(d, padded_, N, v + at, C, 1, w, padded_, o + at, C, false);
  });
}

template <class T>
void Pass<T>::attend_backward(const LatentLayer<T>& layer, int64_t C, const T* qkv, const T* weights, const T* d_o,
                              T* d_qkv, Team team) const {
  const int64_t I = layer.inner, d = I / layer.heads, size = N * padded_;
  const T *k = qkv + I * C, *v = k + I * C;
  T *d_k = d_qkv + I * C, *d_v = d_k + I * C;
  heads(layer, C, team, [&](int64_t at, int64_t at_weights, T* d_weights) {
    const T* w = weights + at_weights;
    T* turned = d_weights + size;  // [queries, tokens], zero where there is no token
    std::fill_n(turned, size, T(0));
    kernels_.transpose(N, N, w, padded_, turned, padded_);
    kernels_.product(d, padded_, N, d_o + at, C, 1, turned, padded_, d_v + at, C, false);
    kernels_.product(N, padded_, d, v + at, 1, C, d_o + at, C, d_weights, padded_, false);
    kernels_.softmax_backward(N, padded_, w, d_weights, layer.scale);
    kernels_.product(d, padded_, N, k + at, C, 1, d_weights, padded_, d_qkv + at, C, false);
    kernels_.transpose(N, N, d_weights, padded_, turned, padded_);
    kernels_.product(d, padded_, N, qkv + at, C, 1, turned, padded_, d_k + at, C, false);
  });
}

template <class T>
void Pass<T>::forward(int64_t first, int64_t last, const T* x_, T* y, T* saved, Team team) const {
  const int64_t C = (last - first) * padded_;
  const Aligned<T> stream(D * C), normed(D * C), branch(D * C), inner(inner_ * C), unsaved(saved ? 0 : most_);
  T *x = stream.get(), *z = normed.get();
  load(first, last, x_, x);
  for (const auto& layer : call_.layers) {
    const auto& p = layer.parameters;
    const int64_t I = layer.inner;
    T *xhat = saved ? saved : unsaved.get(), *rstd = xhat + D * C, *h = rstd + C, *made = inner.get();
    kernels_.normalize(D, C, x, layer.eps, xhat, rstd);
    kernels_.affine(D, C, xhat, p.norm_weight, p.norm_bias, z);
    if (layer.heads > 0) {
      T* weights = h + 3 * I * C;
      made = weights + layer.heads * N * C;
      product(I, C, D, p.first, D, 1, z, h, team);
      product(2 * I, C, D, p.second, D, 1, z, h + I * C, team);
      attend(layer, C, h, weights, made, team);
    } else {
      product(2 * I, C, D, p.first, D, 1, z, h, team);
      kernels_.geglu(I, C, p.second, h, made);
    }
    product(D, C, I, p.last, I, 1, made, branch.get(), team);
    kernels_.join(D, C, branch.get(), p.last_bias, x);
    if (saved) saved += saved_of(layer);
  }
  store(first, last, x, y);
}

template <class T>
void Pass<T>::backward(int64_t first, int64_t last, const T* d_y, const T* saved, T* d_x,
                       const std::vector<LatentLayerParameters<T>>& sums, Team team) const {
  const int64_t C = (last - first) * padded_;
  const Aligned<T> stream(D * C), normed(D * C), branch(D * C), inner(inner_ * C), remade(inner_ * C), wide(wide_ * C);
  const Aligned<T> turned(C * padded(std::max(D, inner_)));
  T *d = stream.get(), *z = normed.get(), *d_z = branch.get(), *d_made = inner.get(), *d_h = wide.get();
  T* const room = turned.get();
  load(first, last, d_y, d);
  saved += saved_;
  for (int64_t i = int64_t(call_.layers.size()) - 1; i >= 0; --i) {
    const auto& layer = call_.layers[i];
    const auto &p = layer.parameters, &sum = sums[i];
    const int64_t I = layer.inner;
    saved -= saved_of(layer);
    const T *xhat = saved, *rstd = xhat + D * C, *h = rstd + C, *made = remade.get();
    kernels_.row_sums(D, C, d, sum.last_bias);
    product(I, C, D, p.last, 1, I, d, d_made, team);
    if (layer.heads > 0) {
      const T* weights = h + 3 * I * C;
      made = weights + layer.heads * N * C;
      attend_backward(layer, C, h, weights, d_made, d_h, team);
    } else {
      kernels_.geglu_backward(I, C, d_made, h, remade.get(), d_h);
      kernels_.row_sums(2 * I, C, d_h, sum.second);
    }
    outer(D, I, C, d, made, room, sum.last, team);
    kernels_.affine(D, C, xhat, p.norm_weight, p.norm_bias, z);
    outer(rows_of_first(layer), D, C, d_h, z, room, sum.first, team);  // of to_q and to_kv, which lie together
    product(D, C, layer.heads > 0 ? I : 2 * I, p.first, 1, D, d_h, d_z, team);
    if (layer.heads > 0) product(D, C, 2 * I, p.second, 1, D, d_h + I * C, d_z, team, true);
    kernels_.normalize_backward(D, C, d_z, xhat, rstd, p.norm_weight, d, sum.norm_weight, sum.norm_bias);
  }
  store(first, last, d, d_x);
}

}  // namespace

template <class T>
int64_t latent_layers_saved(const LatentLayers<T>& call) {
  const Pass<T> pass(call);
  return pass.chunks() * pass.saved();
}

template <class T>
void latent_layers_forward(const LatentLayers<T>& call, const T* x, T* y, T* saved, const Parallel& parallel) {
  const Pass<T> pass(call);
  const auto run = [&](int64_t begin, int64_t end, Team team) {
    pass.chunks_of(begin, end, [&](int64_t chunk, int64_t first, int64_t last) {
      pass.forward(first, last, x, y, saved ? saved + chunk * pass.saved() : nullptr, team);
    });
  };
  const int64_t chunks = pass.chunks();
  if (chunks < 2 * parallel.threads || pass.work() < kShareWork) return run(0, chunks, Team{&parallel});
  parallel.run(chunks, [&](int64_t begin, int64_t end) { run(begin, end, Team{nullptr}); });
}

template <class T>
void latent_layers_backward(const LatentLayers<T>& call, const T* d_y, const T* saved, T* d_x,
                            const std::vector<LatentLayerParameters<T>>& gradients, const Parallel& parallel) {
  const Pass<T> pass(call);
  const int64_t chunks = pass.chunks(), layers = call.layers.size();
  const int64_t parts = std::clamp<int64_t>(chunks / kPartChunks, 1, kMostParts);
  int64_t size = 0;
  for (const auto& layer : call.layers) size += pass.gradients_of(layer);
  const Aligned<T> memory(parts * size);
  std::vector<std::vector<LatentLayerParameters<T>>> sums(parts);
  for (int64_t part = 0; part < parts; ++part) {
    T* at = memory.get() + part * size;
    for (const auto& layer : call.layers) {
      sums[part].push_back(pass.gradients_in(layer, at));
      at += pass.gradients_of(layer);
    }
  }
  const auto run = [&](int64_t begin, int64_t end, Team team) {
    for (int64_t part = begin; part < end; ++part) {
      std::fill_n(memory.get() + part * size, size, T(0));
      pass.chunks_of(chunks * part / parts, chunks * (part + 1) / parts,
                     [&](int64_t chunk, int64_t first, int64_t last) {
                       pass.backward(first, last, d_y, saved + chunk * pass.saved(), d_x, sums[part], team);
                     });
    }
  };
  if (parts < 2 * parallel.threads)
    run(0, parts, Team{&parallel});
  else
    parallel.run(parts, [&](int64_t begin, int64_t end) { run(begin, end, Team{nullptr}); });
  for (int64_t i = 0; i < layers; ++i)
    for (int64_t part = 0; part < parts; ++part)
      pass.add_gradients(call.layers[i], sums[part][i], gradients[i], part == 0);
}

#define PF_INSTANTIATE(T)                                                                                        \
  template int64_t latent_layers_saved<T>(const LatentLayers<T>&);                                               \
  template void latent_layers_forward<T>(const LatentLayers<T>&, const T*, T*, T*, const Parallel&);             \
  template void latent_layers_backward<T>(const LatentLayers<T>&, const T*, const T*, T*,                        \
                                          const std::vector<LatentLayerParameters<T>>&, const Parallel&);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace perceiver_fast
