// Random calls of small models' ops.
#pragma once

#include "../../csrc/core/grid_cross_attention.h"
#include "../../csrc/core/latent_cross_attention.h"
#include "../../csrc/core/latent_layers.h"
#include "../../csrc/core/layer_norm_linear.h"
#include "core_tools.h"

namespace {

// Arrays of parameters of these sizes, and as many for their gradients.
template <class T>
std::vector<Array<T>> arrays(const std::vector<int64_t>& sizes, Generator* random) {
  std::vector<Array<T>> found;
  for (int64_t size : sizes) found.push_back(random ? Array<T>(size, *random) : Array<T>(size));
  return found;
}

template <class T>
Digest& operator<<(Digest& digest, const std::vector<Array<T>>& all) {
  for (const Array<T>& array : all) digest << array;
  return digest;
}

template <class T>
Case latent_layers(Generator& random) {
  const int64_t B = random.pick({1, 2, 5, 40}), N = random.pick({1, 3, 16, 33, 70}), D = random.pick({1, 7, 16, 65, 70}),
                H = random.pick({1, 2, 3}), I = H * random.pick({1, 4, 9, 16}), F = random.pick({1, 5, 32});
  const Dropout dropout(random.pick({0, 0, 1}) * 0.3, 7);
  const bool noisy = random.flip(), again = random.flip();
  const auto p = arrays<T>({D, D, I * D, 2 * I * D, D * I, D, D, D, 2 * F * D, 2 * F, D * F, D}, &random);
  const Array<T> x(B * N * D, random), d_y(B * N * D, random), noise(noisy ? B * N * D : 0, random);
  const auto more = arrays<T>({D, D, I * D, 2 * I * D, D * I, D, D, D, 2 * F * D, 2 * F, D * F, D}, &random);
  return [=](const Parallel& parallel) {
    LatentLayers<T> call{B, N, D, {}};
    const auto layer = [&](int64_t i, int64_t heads, int64_t inner, const T* with) {
      const Array<T>* at = &p[6 * i];
      call.layers.push_back({heads, inner, 0.7, 1e-5,
                             {at[0].data(), at[1].data(), at[2].data(), at[3].data(), at[4].data(), at[5].data()},
                             heads > 0 ? dropout : Dropout(0, 0), with});
    };
    layer(0, H, I, nullptr);
    layer(1, 0, F, noise.data());
    const Array<T> y(B * N * D), d_x(B * N * D), saved(latent_layers_saved(call));
    const auto grads = arrays<T>({D, D, I * D, 2 * I * D, D * I, D, D, D, 2 * F * D, 2 * F, D * F, D}, nullptr);
    std::vector<LatentLayerParameters<T>> to;
    std::vector<LatentLayerParameters<const T>> from;
    for (size_t i = 0; i < grads.size(); i += 6) {
      const Array<T>*g = &grads[i], *m = &more[i];
      to.push_back({g[0].data(), g[1].data(), g[2].data(), g[3].data(), g[4].data(), g[5].data()});
      if (again) from.push_back({m[0].data(), m[1].data(), m[2].data(), m[3].data(), m[4].data(), m[5].data()});
    }
    latent_layers_forward<T>(call, x.data(), y.data(), saved.data(), parallel);
    latent_layers_backward<T>(call, d_y.data(), saved.data(), d_x.data(), to, from, parallel);
    Digest digest;
    return (digest << y << d_x << grads).value;
  };
}

template <class T>
Case latent_cross_attention(Generator& random) {
  const int64_t B = random.pick({1, 2, 5, 40}), shared = random.flip() ? 1 : B, N = random.pick({1, 3, 16, 33, 70}),
                D = random.pick({1, 7, 16, 33}), M = random.pick({1, 2, 17, 64, 129}), H = random.pick({1, 2, 3}),
                I = H * random.pick({1, 4, 9, 16});
  const Dropout dropout(random.pick({0, 0, 1}) * 0.3, 7);
  const bool adds = random.flip();
  const std::vector<int64_t> sizes{D, D, I * D, D * I, D};
  const auto p = arrays<T>(sizes, &random);
  const Array<T> x(shared * N * D, random), kv(B * M * 2 * I, random), d_y(B * N * D, random);
  const Array<uint8_t> mask = mask_of(B, M, random.flip(), random);
  return [=](const Parallel& parallel) {
    const LatentCrossAttention<T> call{
        B,   shared, N, D, M, H, I, adds, 0.7, 1e-5, dropout, x.data(), kv.data(), mask.data(),
        {p[0].data(), p[1].data(), p[2].data(), p[3].data(), p[4].data()}};
    const Array<T> y(B * N * D), q(shared * N * I), o(B * N * I), rest(latent_cross_attention_rest(call));
    const Array<double> lse(B * H * N);
    const Array<T> d_x(shared * N * D), d_kv(B * M * 2 * I);
    const auto g = arrays<T>(sizes, nullptr);
    const LatentCrossAttentionSaved<T> saved{q.data(), o.data(), lse.data(), rest.data()};
    latent_cross_attention_forward<T>(call, y.data(), saved, parallel);
    latent_cross_attention_backward<T>(call, d_y.data(), saved, d_x.data(), d_kv.data(),
                                       {g[0].data(), g[1].data(), g[2].data(), g[3].data(), g[4].data()}, parallel);
    Digest digest;
    return (digest << y << q << o << lse << d_x << d_kv << g).value;
  };
}

// Of a grid, or of tokens of no axis.
template <class T>
Case grid_cross_attention(Generator& random) {
  const int64_t B = random.pick({1, 2, 5, 40}), shared = random.flip() ? 1 : B, N = random.pick({1, 3, 16, 33}),
                D = random.pick({1, 7, 16, 33}), H = random.pick({1, 2, 3}), I = H * random.pick({1, 4, 9, 16}),
                F = random.pick({1, 3, 9}), width = random.pick({1, 5}), alone = random.pick({2, 17, 70});
  std::vector<int64_t> sizes(random.pick({0, 1, 2}));
  int64_t M = 1, L = F, C = F;
  for (int64_t& size : sizes) size = random.pick({1, 5, 8, 17}), M *= size, L += size, C += width;
  if (sizes.empty()) M = alone;
  const Dropout dropout(sizes.empty() ? 0 : random.pick({0, 0, 1}) * 0.3, 7);
  const std::vector<int64_t> shapes{D, D, I * D, C, C, 2 * I * C, D * I, D};
  const auto p = arrays<T>(shapes, &random);
  const Array<T> x(shared * N * D, random), feat(B * M * F, random), d_y(B * N * D, random);
  const Array<T> scale(sizes.empty() ? 0 : B * M, random, 1.5);
  std::vector<int64_t> lengths;
  for (int64_t size : sizes) lengths.push_back(size * width);
  const auto codes = arrays<T>(lengths, &random);
  const Array<uint8_t> mask = mask_of(B, M, random.flip(), random);
  return [=](const Parallel& parallel) {
    GridCrossAttention<T> call;
    call.batch = B, call.x_batch = shared, call.latents = N, call.channels = D, call.heads = H, call.inner = I;
    call.features = F, call.context_channels = C, call.sizes = sizes, call.logit_scale = 0.7, call.eps = 1e-5;
    call.x = x.data(), call.feat = feat.data(), call.scale = scale.data(), call.tokens = M, call.mask = mask.data();
    call.dropout = dropout;
    for (const Array<T>& code : codes) call.codes.push_back(code.data()), call.code_channels.push_back(width);
    call.parameters = {p[0].data(), p[1].data(), p[2].data(), p[3].data(),
                       p[4].data(), p[5].data(), p[6].data(), p[7].data()};
    const Array<T> y(B * N * D), q(shared * H * N * L), o(B * H * N * L), rest(grid_cross_attention_rest(call));
    const Array<T> kept(dropout ? B * H * N : 0), d_x(shared * N * D);
    const Array<double> lse(B * H * N);
    const auto g = arrays<T>(shapes, nullptr);
    const GridCrossAttentionSaved<T> saved{q.data(), o.data(), lse.data(), kept.data(), rest.data()};
    grid_cross_attention_forward<T>(call, y.data(), saved, parallel);
    grid_cross_attention_backward<T>(call, d_y.data(), saved, d_x.data(),
                                     {g[0].data(), g[1].data(), g[2].data(), g[3].data(), g[4].data(), g[5].data(),
                                      g[6].data(), g[7].data()},
                                     parallel);
    Digest digest;
    return (digest << y << q << o << lse << kept << d_x << g).value;
  };
}

template <class T>
Case layer_norm_linear(Generator& random) {
  const int64_t rows = random.pick({1, 3, 64, 65, 300}), C = random.pick({1, 7, 16, 33, 130}),
                O = random.pick({1, 5, 16, 40});
  const bool to_x = random.flip();
  const Array<T> x(rows * C, random), gain(C, random), shift(C, random), weight(O * C, random), d_out(rows * O, random);
  return [=](const Parallel& parallel) {
    const LayerNormLinear<T> call{rows, C, O, 1e-5, x.data(), gain.data(), shift.data(), weight.data()};
    const Array<T> out(rows * O), d_x(to_x ? rows * C : 0), d_gain(C), d_shift(C), d_weight(O * C);
    layer_norm_linear_forward<T>(call, out.data(), parallel);
    layer_norm_linear_backward<T>(call, d_out.data(), d_x.data(), d_gain.data(), d_shift.data(), d_weight.data(), parallel);
    return (Digest() << out << d_x << d_gain << d_shift << d_weight).value;
  };
}

}  // namespace
