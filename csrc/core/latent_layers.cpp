// Drivers of latents through pre-normalised layers: a chunk of batch elements (latent_columns.h) goes through all layers
// before the next one does.
//
// The backward needs every layer's normalised latents, and what is between its products. The latter is computed again
// where the latents have few channels: a number then costs fewer multiply-adds than it takes to write and read it.
//
// Threads share the chunks, or where these are few the rows of every product.
// Memory: a chunk's matrices for each thread, and in the backward the parameters' gradients for each part of the sum.
#include "latent_layers.h"

#include <algorithm>

#include "latent_attention.h"

namespace perceiver_fast {

namespace {

constexpr int64_t kAgain = 64;       // channels up to which it is computed again
constexpr int64_t kGegluWork = 16;  // multiply-adds in whose time a GEGLU is done

template <class T>
int64_t rows_of_first(const LatentLayer<T>& layer) {  // and of to_kv, which lies behind to_q's gradient
  return (layer.heads > 0 ? 3 : 2) * layer.inner;
}

template <class T>
class Pass : public LatentColumns<T> {
 public:
  using LatentColumns<T>::N;
  using LatentColumns<T>::D;
  using LatentColumns<T>::kernels;
  using LatentColumns<T>::padded;

  explicit Pass(const LatentLayers<T>& call)
      : LatentColumns<T>(call.batch, call.latents, call.channels, true), layers(call.layers) {
    for (const auto& layer : layers) {
      inner_ = std::max(inner_, layer.inner);
      wide_ = std::max(wide_, rows_of_first(layer));
      most_ = std::max(most_, between(layer));
      saved += saved_of(layer);
      drops_ |= layer.noise != nullptr;
      gradients += gradients_of(layer);
      work += layer.inner * (D * (layer.heads > 0 ? 4 : 3) + 2 * N) * call.batch * N;
    }
  }

  void forward(int64_t chunk, const T* x_, T* y, T* saved, Team team) const;
  void backward(int64_t chunk, const T* d_y, const T* saved, T* d_x, const std::vector<LatentLayerParameters<T>>& sums,
                bool begins, Team team) const;

  // Gradients of a layer's parameters in a sum over chunks, where rows are padded to whole vectors.
  int64_t gradients_of(const LatentLayer<T>& layer) const {
    return 3 * D + rows_of_first(layer) * padded(D) + (layer.heads > 0 ? 0 : 2 * layer.inner) + D * padded(layer.inner);
  }
  std::vector<LatentLayerParameters<T>> gradients_in(T* at) const {
    std::vector<LatentLayerParameters<T>> all;
    for (const auto& layer : layers) {
      all.push_back(gradients_in(layer, at));
      at += gradients_of(layer);
    }
    return all;
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

  bool is_whole() const {  // whether no gradient's row is padded
    bool whole = padded(D) == D;
    for (const auto& layer : layers) whole = whole && padded(layer.inner) == layer.inner;
    return whole;
  }

  const std::vector<LatentLayer<T>>& layers;
  int64_t saved = 0, gradients = 0, work = 0;  // numbers that a column saves, those of all gradients, multiply-adds

 private:
  // Rows of what is between a layer's products: of attention q, k, v and what they make; of a feed-forward h.
  static int64_t between(const LatentLayer<T>& layer) { return (layer.heads > 0 ? 4 : 2) * layer.inner; }
  // Of xhat and rstd, and what is between.
  int64_t saved_of(const LatentLayer<T>& layer) const { return D + 1 + (D > kAgain ? between(layer) : 0); }

  LatentAttention<T> attention(const LatentLayer<T>& layer) const {
    return LatentAttention<T>(*this, layer.heads, layer.inner, layer.scale, layer.dropout);
  }
  void project(const LatentLayer<T>& layer, int64_t columns, const T* z, T* qkv, Team team) const;
  void widen(const LatentLayer<T>& layer, int64_t columns, const T* z, T* h, T* made, Team team) const;

  int64_t inner_ = 0, wide_ = 0, most_ = 0;  // the largest of all layers
  bool drops_ = false;                       // whether one has noise
};

// q, k and v [3 I, columns] from z [D, columns].
template <class T>
void Pass<T>::project(const LatentLayer<T>& layer, int64_t C, const T* z, T* qkv, Team team) const {
  const int64_t I = layer.inner;
  this->product(I, C, D, layer.parameters.first, D, 1, z, qkv, team);
  this->product(2 * I, C, D, layer.parameters.second, D, 1, z, qkv + I * C, team);
}

// A feed-forward's h [2 I, columns] from z, and of it what the last weights multiply.
template <class T>
void Pass<T>::widen(const LatentLayer<T>& layer, int64_t C, const T* z, T* h, T* made, Team team) const {
  const auto& p = layer.parameters;
  const int64_t I = layer.inner;
  this->product(2 * I, C, D, p.first, D, 1, z, h, team);
  team.run(I, 1, I * C * kGegluWork, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * C;
    kernels.geglu(end - begin, C, p.second + begin, p.second + I + begin, h + at, h + I * C + at, made + at);
  });
}

template <class T>
void Pass<T>::forward(int64_t chunk, const T* x_, T* y, T* saved, Team team) const {
  const int64_t C = this->columns(chunk);
  const bool keeps = saved && D > kAgain;
  const Aligned<T> stream(D * C), normed(D * C), branch(D * C), inner(inner_ * C), unsaved(keeps ? 0 : most_ * C);
  const Aligned<T> statistics(saved ? 0 : (D + 1) * C), drawn(drops_ ? D * C : 0);
  T *x = stream.get(), *z = normed.get();
  this->load(chunk, x_, x);
  for (const auto& layer : layers) {
    const auto& p = layer.parameters;
    T *xhat = saved ? saved : statistics.get(), *rstd = xhat + D * C;
    kernels.normalize(D, C, x, layer.eps, xhat, rstd);
    kernels.affine(D, C, xhat, p.norm_weight, p.norm_bias, z);
    T *h = keeps ? rstd + C : unsaved.get(), *made = inner.get();
    if (layer.heads > 0) {
      made = h + 3 * layer.inner * C;
      project(layer, C, z, h, team);
      attention(layer).forward(chunk, h, made, team);
    } else {
      widen(layer, C, z, h, made, team);
    }
    this->product(D, C, layer.inner, p.last, layer.inner, 1, made, branch.get(), team);
    if (layer.noise) this->load(chunk, layer.noise, drawn.get());
    kernels.join(D, C, branch.get(), p.last_bias, layer.noise ? drawn.get() : nullptr, x);
    if (saved) saved += saved_of(layer) * C;
  }
  this->store(chunk, x, y);
}

template <class T>
void Pass<T>::backward(int64_t chunk, const T* d_y, const T* kept, T* d_x,
                       const std::vector<LatentLayerParameters<T>>& sums, bool begins, Team team) const {
  const int64_t C = this->columns(chunk);
  const bool kept_between = D > kAgain;
  const Aligned<T> stream(D * C), normed(D * C), branch(D * C), inner(inner_ * C + padded(1)), remade(inner_ * C);
  const Aligned<T> dropped(drops_ ? D * C : 0), wide(wide_ * C), turned(C * padded(std::max(D, inner_)));
  const Aligned<T> again(kept_between ? 0 : most_ * C);
  T *d = stream.get(), *z = normed.get(), *d_z = branch.get(), *d_made = inner.get(), *d_h = wide.get();
  T* const room = turned.get();
  this->load(chunk, d_y, d);
  kept += saved * C;
  auto next = sums.rbegin();
  for (auto layer = layers.rbegin(); layer != layers.rend(); ++layer) {
    kept -= saved_of(*layer) * C;
    const auto& p = layer->parameters;
    const auto& sum = *next++;
    const int64_t I = layer->inner;
    const bool with_heads = layer->heads > 0;
    const T *xhat = kept, *rstd = xhat + D * C, *h = kept_between ? rstd + C : again.get(), *made = remade.get();
    kernels.affine(D, C, xhat, p.norm_weight, p.norm_bias, z);
    if (begins) {
      for (T* each : {sum.norm_weight, sum.norm_bias, sum.last_bias}) std::fill_n(each, D, T(0));
      if (!with_heads) std::fill_n(sum.second, 2 * I, T(0));
    }
    const T* d_branch = d;
    if (layer->noise) {
      this->load(chunk, layer->noise, d_z);
      kernels.multiply(D, C, d, d_z, dropped.get());
      d_branch = dropped.get();
    }
    kernels.row_sums(D, C, d_branch, sum.last_bias);
    this->product(I, C, D, p.last, 1, I, d_branch, d_made, team);
    if (with_heads) {
      T* const o = kept_between ? nullptr : again.get() + 3 * I * C;
      if (!kept_between) project(*layer, C, z, again.get(), team);
      attention(*layer).backward(chunk, h, d_made, d_h, o, team);
      made = h + 3 * I * C;
    } else {
      if (!kept_between) widen(*layer, C, z, again.get(), remade.get(), team);
      team.run(I, 1, I * C * kGegluWork, [&](int64_t begin, int64_t end) {
        const int64_t at = begin * C, gates = I * C + at;
        kernels.geglu_backward(end - begin, C, d_made + at, h + at, h + gates, remade.get() + at, d_h + at, d_h + gates);
      });
      kernels.row_sums(2 * I, C, d_h, sum.second);
    }
    this->turn(I, C, made, room);
    this->outer(D, I, C, d_branch, room, sum.last, begins, team);
    this->turn(D, C, z, room);
    this->outer(with_heads ? I : 2 * I, D, C, d_h, room, sum.first, begins, team);
    if (with_heads) this->outer(2 * I, D, C, d_h + I * C, room, sum.second, begins, team);
    this->product(D, C, with_heads ? I : 2 * I, p.first, 1, D, d_h, d_z, team);
    if (with_heads) this->product(D, C, 2 * I, p.second, 1, D, d_h + I * C, d_z, team, true);
    kernels.normalize_backward(D, C, d_z, xhat, rstd, p.norm_weight, d, sum.norm_weight, sum.norm_bias);
  }
  this->store(chunk, d, d_x);
}

template <class T>
void make_gradients(const LatentLayers<T>& call, const T* d_y, const T* saved, T* d_x,
                    const std::vector<LatentLayerParameters<T>>& gradients, const Parallel& parallel) {
  const Pass<T> pass(call);
  // One sum whose rows need no padding is made where it belongs: what is as large as all parameters is not copied.
  const int64_t chunks = pass.chunks(), parts = parts_of(chunks);
  const bool in_place = parts == 1 && pass.is_whole();
  const Aligned<T> memory(in_place ? 0 : parts * pass.gradients);
  std::vector<std::vector<LatentLayerParameters<T>>> sums;
  for (int64_t part = 0; part < parts; ++part)
    sums.push_back(in_place ? gradients : pass.gradients_in(memory.get() + part * pass.gradients));
  for_parts(chunks, pass.work, parallel, [&](int64_t chunk, int64_t part, bool begins, Team team) {
    pass.backward(chunk, d_y, saved + pass.columns_before(chunk) * pass.saved, d_x, sums[part], begins, team);
  });
  if (in_place) return;
  add_parts(parts, pass.gradients, memory.get());
  for (size_t i = 0; i < call.layers.size(); ++i) {
    const auto& layer = call.layers[i];
    const auto& from = sums[0][i];
    const auto& to = gradients[i];
    const int64_t D = call.channels, I = layer.inner, row = pass.padded(D);
    std::copy_n(from.norm_weight, D, to.norm_weight);
    std::copy_n(from.norm_bias, D, to.norm_bias);
    std::copy_n(from.last_bias, D, to.last_bias);
    copy_rows(layer.heads > 0 ? I : 2 * I, D, from.first, row, to.first, D);
    if (layer.heads > 0)
      copy_rows(2 * I, D, from.second, row, to.second, D);
    else
      std::copy_n(from.second, 2 * I, to.second);
    copy_rows(D, I, from.last, pass.padded(I), to.last, I);
  }
}

// to += from, for all parameters.
template <class T>
void add_gradients(const LatentLayers<T>& call, const std::vector<LatentLayerParameters<const T>>& from,
                   const std::vector<LatentLayerParameters<T>>& to, const Parallel& parallel) {
  struct Piece {
    T* to;
    const T* from;
    int64_t count;
  };
  constexpr int64_t kPiece = 8192, kWork = 8;  // numbers, and multiply-adds in whose time one is read and written
  std::vector<Piece> pieces;
  int64_t all = 0;
  const auto add = [&](T* to, const T* from, int64_t count) {
    for (int64_t i = 0; i < count; i += kPiece) pieces.push_back({to + i, from + i, std::min(kPiece, count - i)});
    all += count;
  };
  for (size_t i = 0; i < call.layers.size(); ++i) {
    const int64_t D = call.channels, I = call.layers[i].inner;
    const bool with_heads = call.layers[i].heads > 0;
    const auto &t = to[i];
    const auto &f = from[i];
    add(t.norm_weight, f.norm_weight, D);
    add(t.norm_bias, f.norm_bias, D);
    add(t.first, f.first, (with_heads ? 1 : 2) * I * D);
    add(t.second, f.second, 2 * I * (with_heads ? D : 1));
    add(t.last, f.last, D * I);
    add(t.last_bias, f.last_bias, D);
  }
  Team{&parallel}.run(int64_t(pieces.size()), 1, kWork * all, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t k = 0; k < pieces[i].count; ++k) pieces[i].to[k] += pieces[i].from[k];
  });
}

}  // namespace

template <class T>
int64_t latent_layers_saved(const LatentLayers<T>& call) {
  const Pass<T> pass(call);
  return pass.all_columns() * pass.saved;
}

template <class T>
void latent_layers_forward(const LatentLayers<T>& call, const T* x, T* y, T* saved, const Parallel& parallel) {
  const Pass<T> pass(call);
  for_calls(pass.chunks(), pass.work, parallel, [&](int64_t chunk, Team team) {
    pass.forward(chunk, x, y, saved ? saved + pass.columns_before(chunk) * pass.saved : nullptr, team);
  });
}

template <class T>
void latent_layers_backward(const LatentLayers<T>& call, const T* d_y, const T* saved, T* d_x,
                            const std::vector<LatentLayerParameters<T>>& gradients,
                            const std::vector<LatentLayerParameters<const T>>& added, const Parallel& parallel) {
  make_gradients(call, d_y, saved, d_x, gradients, parallel);
  if (!added.empty()) add_gradients(call, added, gradients, parallel);
}

#define PF_INSTANTIATE(T)                                                                                        \
  template int64_t latent_layers_saved<T>(const LatentLayers<T>&);                                               \
  template void latent_layers_forward<T>(const LatentLayers<T>&, const T*, T*, T*, const Parallel&);             \
  template void latent_layers_backward<T>(const LatentLayers<T>&, const T*, const T*, T*,                        \
                                          const std::vector<LatentLayerParameters<T>>&,                          \
                                          const std::vector<LatentLayerParameters<const T>>&, const Parallel&);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace perceiver_fast
