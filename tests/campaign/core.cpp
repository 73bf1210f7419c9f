// core SEED SECONDS [CASES]: random calls of csrc/core's ops, forward and backward, for a sanitizer to look at.
//
// Every case runs on one thread first. Then three threads call it at once, on the same inputs, each with threads of its
// own to run parts of it: the bits must be the same. Arrays are exactly as long as they have to be, and begin as NaN.
// Seeds follow each other until the time is over or so many cases have run; with 0 seconds one runs. Prints the number
// of cases; exit status 1 when results differ.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../csrc/core/cross_attention.h"
#include "../../csrc/core/fourier_projection.h"
#include "../../csrc/core/geglu.h"
#include "../../csrc/core/grid_attention.h"
#include "../../csrc/core/grid_query_attention.h"
#include "../../csrc/core/grid_scale.h"
#include "../../csrc/core/layer_norm.h"
#include "core_latents.h"
#include "core_tools.h"

using namespace perceiver_fast;

namespace {

template <class T>
Case grid_attention(Generator& random) {
  const int64_t B = random.pick({1, 2, 3}), N = random.pick({1, 2, 5, 16, 33}), F = random.pick({1, 3, 4, 9, 20});
  std::vector<int64_t> sizes(random.pick({1, 1, 2, 2, 3}));
  int64_t M = 1, L = F;
  for (int64_t& size : sizes) size = random.pick({1, 2, 5, 8, 17, 31}), M *= size, L += size;
  const bool inverted = random.flip();
  const Dropout dropout(random.pick({0, 0, 1}) * 0.3, 7);
  const int64_t heads = inverted ? random.pick({1, 2}) : 1, rows = B * heads;
  const Array<T> q(rows * N * L, random), feat(B * M * F, random), scale(B * M, random, 1.5), d_o(rows * N * L, random);
  const Array<uint8_t> mask = mask_of(B, M, random.flip(), random);
  return [=](const Parallel& parallel) {
    const bool counts = inverted || dropout;
    const Array<T> o(rows * N * L), kept(counts ? rows * N : 0);
    const Array<T> dq(rows * N * L), dfeat(rows * M * F), dscale(rows * M);
    const Array<double> lse(rows * N), token_lse(inverted ? rows * M : 0);
    GridAttentionInput<T> in;
    in.batch = rows, in.queries = N, in.features = F, in.heads = heads, in.sizes = sizes;
    in.q = q.data(), in.q_batch_stride = N * L, in.feat = feat.data(), in.scale = scale.data(), in.mask = mask.data();
    in.dropout = dropout, in.inverted = inverted;
    const GridAttentionOutput<T> out{o.data(), lse.data(), kept.data(), token_lse.data()};
    grid_attention_forward<T>(in, out, parallel);
    grid_attention_backward<T>(in, out, {d_o.data(), nullptr, nullptr}, dq.data(), dfeat.data(), dscale.data(),
                               parallel);
    return (Digest() << o << lse << kept << token_lse << dq << dfeat << dscale).value;
  };
}

template <class T>
Case grid_query_attention(Generator& random) {
  const int64_t B = random.pick({1, 2}), H = random.pick({1, 2}), N = random.pick({1, 2, 7, 33, 130}),
                F = random.pick({0, 1, 3, 20}), C = random.pick({1, 2, 4, 5, 19});
  std::vector<int64_t> sizes(random.pick({0, 1, 2, 2, 3}));
  int64_t M = sizes.empty() ? random.pick({1, 17, 70}) : 1, L = F;
  for (int64_t& size : sizes) size = random.pick({1, 2, 5, 8, 17, 65}), M *= size, L += size;
  const bool shared = random.flip(), sum_heads = random.flip();
  const Dropout dropout(random.pick({0, 0, 1}) * 0.3, 7);
  const int64_t outputs = B * M * (sum_heads ? 1 : H) * C, rows = shared ? 1 : B;
  const Array<T> tables(B * H * N * L, random), feat(rows * M * F, random), v(B * H * N * C, random);
  const Array<T> scale(random.flip() ? rows * M : 0, random, 1.5), bias(random.flip() ? B * H * N : 0, random);
  const Array<T> d_o(outputs, random);
  const Array<uint8_t> mask = mask_of(B, N, random.flip(), random);
  return [=](const Parallel& parallel) {
    const Array<T> o(outputs), d_tables(tables.size()), d_feat(B * M * F), d_scale(scale.size() > 0 ? B * M : 0);
    const Array<T> d_bias(bias.size()), d_v(v.size());
    const Array<double> lse(B * H * M);
    GridQueryInput<T> in;
    in.batch = B, in.heads = H, in.keys = N, in.queries = M, in.features = F, in.channels = C, in.sizes = sizes;
    in.tables = tables.data(), in.feat = feat.data(), in.scale = scale.data(), in.bias = bias.data(), in.v = v.data();
    in.feat_batch_stride = shared ? 0 : M * F, in.scale_batch_stride = shared ? 0 : M;
    in.mask = mask.data(), in.dropout = dropout, in.sum_heads = sum_heads;
    grid_query_attention_forward<T>(in, o.data(), outputs / B, lse.data(), parallel);
    grid_query_attention_backward<T>(in, d_o.data(), lse.data(),
                                     {d_tables.data(), d_feat.data(), d_scale.data(), d_bias.data(), d_v.data()},
                                     parallel);
    return (Digest() << o << lse << d_tables << d_feat << d_scale << d_bias << d_v).value;
  };
}

template <class X>
Case cross_attention(Generator& random) {
  const int64_t B = random.pick({1, 2}), H = random.pick({1, 2, 3}), N = random.pick({1, 2, 7, 33, 70}),
                M = random.pick({1, 2, 17, 64, 129}), d = random.pick({1, 3, 8, 16, 33}),
                dv = random.pick({1, 4, 8, 19});
  const bool inverted = random.flip(), learn = random.flip();
  const Dropout dropout(random.pick({0, 0, 1}) * 0.3, 7);
  const Array<X> q(B * H * N * d, random), k(B * H * M * d, random), v(B * H * M * dv, random);
  const Array<X> d_o(B * H * N * dv, random);
  const Array<uint8_t> mask = mask_of(B, M, random.flip(), random);
  return [=](const Parallel& parallel) {
    using T = ComputeOf<X>;
    const Array<T> o(B * H * N * dv);
    const Array<X> dq(q.size()), dk(k.size()), d_v(v.size());
    const Array<double> lse(B * H * N), token_lse(inverted ? B * H * M : 0);
    const CrossAttentionInput<X> in{B, H, N, M, d, dv, {q.data(), H * N * d, N * d, d}, {k.data(), H * M * d, M * d, d},
                                    {v.data(), H * M * dv, M * dv, dv}, mask.data(), 0.7, dropout, inverted};
    const HeadMatrix<X> none{};
    const auto to_k = learn ? dense_heads<X>(dk.data(), H, M, d) : none;
    const auto to_v = learn ? dense_heads<X>(d_v.data(), H, M, dv) : none;
    cross_attention_forward<X>(in, dense_outputs<T>(in, o.data()), lse.data(), token_lse.data(), parallel);
    cross_attention_backward<X>(in, dense_outputs<const T>(in, o.data()), lse.data(), token_lse.data(),
                                dense_outputs<const X>(in, d_o.data()), nullptr, dense_queries<X>(in, dq.data()), to_k,
                                to_v, parallel);
    return (Digest() << o << lse << token_lse << dq << dk << d_v).value;
  };
}

template <class T>
Case fourier_projection(Generator& random) {
  const int64_t B = random.pick({1, 2, 3}), Bc = random.flip() ? B : 1, M = random.pick({1, 2, 31, 65, 130}),
                F = random.pick({0, 1, 3, 17}), A = random.pick({1, 2, 3}), K = random.pick({0, 1, 5, 16}),
                D = random.pick({1, 8, 20, 67}), C = F + A * (2 * K + 1);
  const bool normed = random.flip();
  const Array<T> feat(B * M * F, random), weight(C * D, random), bias(random.flip() ? D : 0, random);
  const Array<T> d_out(B * M * D, random);
  const Array<double> coords(Bc * M * A, random), frequencies(A * K, random, 5);
  return [=](const Parallel& parallel) {
    const FourierProjectionInput<T> in{B, Bc, M, F, A, K, D, feat.data(), coords.data(), frequencies.data(),
                                       weight.data()};
    const Array<T> out(B * M * D), scale(normed ? B * M : 0), dweight(C * D), dfeat(B * M * F);
    const Array<double> dcoords(Bc * M * A);
    fourier_projection_forward<T>(in, bias.data(), 1e-5, out.data(), scale.data(), parallel);
    fourier_projection_backward<T>(in, scale.data(), d_out.data(), dweight.data(), dfeat.data(), dcoords.data(),
                                   parallel);
    return (Digest() << out << scale << dweight << dfeat << dcoords).value;
  };
}

template <class T>
Case grid_scale(Generator& random) {
  const int64_t B = random.pick({1, 2}), F = random.pick({1, 3, 17});
  std::vector<int64_t> sizes(random.pick({1, 2, 3})), widths(sizes.size(), random.pick({1, 7}));
  int64_t M = 1, sum = 0;
  for (int64_t& size : sizes) size = random.pick({1, 2, 9, 16}), M *= size, sum += size;
  const Array<T> feat(B * M * F, random), mean(sum, random), square(sum, random, 1.5);
  return [=](const Parallel& parallel) {
    const Array<T> scale(B * M);
    grid_scale_forward<T>(feat.data(), B, sizes, F, mean.data(), square.data(), widths, 1e-5, scale.data(), parallel);
    return (Digest() << scale).value;
  };
}

template <class D>
Case layer_norm(Generator& random) {
  using S = typename D::Wide;
  using P = typename D::Narrow;
  using T = typename D::T;
  const int64_t rows = random.pick({1, 2, 3, 40, 129}), n = random.pick({1, 2, 7, 8, 17, 33, 64, 130});
  const bool branched = random.flip(), biased = branched && random.flip();
  const Array<S> x(rows * n, random), weight(n, random), bias(n, random), branch_bias(biased ? n : 0, random);
  const Array<S> d_y(rows * n, random);
  const Array<P> branch(branched ? rows * n : 0, random), d_z(rows * n, random);
  return [=](const Parallel& parallel) {
    const Array<S> y(branched ? rows * n : 0), d_x(rows * n), d_weight(n), d_bias(n), d_branch_bias(biased ? n : 0);
    const Array<P> z(rows * n), d_branch(branched ? rows * n : 0);
    const Array<T> mean(rows), rstd(rows);
    layer_norm_forward<D>({rows, n, x.data(), branch.data(), branch_bias.data(), weight.data(), bias.data(), 1e-5,
                           y.data(), z.data(), mean.data(), rstd.data()},
                          parallel);
    layer_norm_backward<D>({rows, n, d_y.data(), d_z.data(), branched ? y.data() : x.data(), mean.data(), rstd.data(),
                            weight.data(), d_x.data(), d_branch.data(), d_weight.data(), d_bias.data(),
                            d_branch_bias.data()},
                           parallel);
    return (Digest() << y << z << mean << rstd << d_x << d_branch << d_weight << d_bias << d_branch_bias).value;
  };
}

template <class D>
Case geglu(Generator& random) {
  using B = typename D::Wide;
  using P = typename D::Narrow;
  const int64_t rows = random.pick({1, 2, 3, 40, 129}), n = random.pick({1, 2, 7, 8, 17, 33, 64, 130});
  const bool biased = random.flip();
  const Array<P> h(rows * 2 * n, random), d_u(rows * n, random);
  const Array<B> bias(biased ? 2 * n : 0, random);
  return [=](const Parallel& parallel) {
    const Array<P> u(rows * n), again(rows * n), d_h(rows * 2 * n);
    const Array<B> d_bias(biased ? 2 * n : 0);
    geglu_forward<D>({rows, n, h.data(), bias.data(), u.data()}, parallel);
    geglu_backward<D>({rows, n, d_u.data(), h.data(), bias.data(), again.data(), d_h.data(), d_bias.data()}, parallel);
    return (Digest() << u << again << d_h << d_bias).value;
  };
}

struct Named {
  const char* name;
  Case (*make)(Generator&);
};

const std::vector<Named>& ops() {
  static const std::vector<Named> all = [] {
    std::vector<Named> found{{"grid_attention, float", grid_attention<float>},
                             {"grid_attention, double", grid_attention<double>},
                             {"grid_query_attention, float", grid_query_attention<float>},
                             {"grid_query_attention, double", grid_query_attention<double>},
                             {"cross_attention, float", cross_attention<float>},
                             {"cross_attention, double", cross_attention<double>},
                             {"cross_attention, bfloat16", cross_attention<BFloat16>},
                             {"fourier_projection, float", fourier_projection<float>},
                             {"fourier_projection, double", fourier_projection<double>},
                             {"grid_scale, float", grid_scale<float>},
                             {"grid_scale, double", grid_scale<double>},
                             {"latent_layers, float", latent_layers<float>},
                             {"latent_layers, double", latent_layers<double>},
                             {"latent_cross_attention, float", latent_cross_attention<float>},
                             {"latent_cross_attention, double", latent_cross_attention<double>},
                             {"grid_cross_attention, float", grid_cross_attention<float>},
                             {"grid_cross_attention, double", grid_cross_attention<double>},
                             {"layer_norm_linear, float", layer_norm_linear<float>},
                             {"layer_norm_linear, double", layer_norm_linear<double>}};
#define PF_ADD(D) found.push_back({"layer_norm", layer_norm<D>}), found.push_back({"geglu", geglu<D>});
    PF_FOR_DTYPES(PF_ADD)
#undef PF_ADD
    return found;
  }();
  return all;
}

bool same_bits(uint64_t seed) {
  Generator random{std::mt19937_64(seed)};
  const Named& op = ops()[random.bits() % ops().size()];
  const int threads = int(random.pick({1, 2, 3, 4}));
  const Case run = op.make(random);
  const uint64_t expected = run(in_turn(threads));
  std::atomic<int> differing{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&] { differing += run(at_once(threads)) != expected; });
  for (std::thread& caller : callers) caller.join();
  if (differing) std::printf("seed %llu: %s, %d threads: other bits\n", (unsigned long long)seed, op.name, threads);
  return differing == 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3 && count != 4) {
    std::printf("expected a seed, a number of seconds, and perhaps of cases, got %d arguments\n", count - 1);
    return 2;
  }
  const uint64_t first = std::strtoull(arguments[1], nullptr, 10);
  const double seconds = std::strtod(arguments[2], nullptr);
  const int64_t most = count == 4 ? std::strtoll(arguments[3], nullptr, 10) : INT64_MAX;
  const auto begin = std::chrono::steady_clock::now();
  int64_t cases = 0, failures = 0;
  do {
    std::fprintf(stderr, "seed %llu\n", (unsigned long long)(first + cases));  // before a sanitizer ends the process
    failures += !same_bits(first + cases);
    ++cases;
  } while (cases < most && std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < seconds);
  std::printf("%lld cases\n", (long long)cases);
  return failures == 0 ? 0 : 1;
}
