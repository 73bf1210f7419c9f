// The forwards of grid_attention, grid_query_attention, cross_attention and fourier_projection against plain loops in double, on small sizes:
// one query, one token, one channel, blocks and tiles that are not full; masks, dropout, inverted attention, threads.
#include <cmath>
#include <numeric>
#include <vector>

#include "../../csrc/core/cross_attention.h"
#include "../../csrc/core/fourier_projection.h"
#include "../../csrc/core/grid_attention.h"
#include "../../csrc/core/grid_query_attention.h"
#include "check.h"

using namespace perceiver_fast;

namespace {

using Numbers = std::vector<double>;

Parallel threads(int count) {
  return {count, [](int64_t n, const auto& body) {
            for (int64_t i = n; i-- > 0;) body(i, i + 1);  // the last one first: results must not hang on the order
          }};
}

// Random numbers of type T between guards.
template <class T>
struct Input {
  Guarded<T> array;
  Input(int64_t count, uint64_t seed, double offset = 0) : array(count) {
    Random random{seed};
    for (int64_t i = 0; i < count; ++i) array[i] = T(random() + offset);
  }
  const T* data() const { return array.data(); }
  T operator[](int64_t i) const { return array[i]; }
};

struct Mask {
  Guarded<uint8_t> array;
  bool used;
  Mask(int64_t batch, int64_t tokens, bool used_) : array(batch * tokens), used(used_) {
    Random random{77};
    for (int64_t i = 0; i < batch * tokens; ++i) array[i] = i % tokens == 0 || random() > -0.3;
  }
  const uint8_t* data() const { return used ? array.data() : nullptr; }
  bool hides(int64_t i) const { return used && !array[i]; }
};

template <class X>
void compare(const Guarded<X>& actual, const Numbers& expected, double rounding, const char* what) {
  double largest = 0;
  for (int64_t i = 0; i < actual.size(); ++i) {
    const double error = std::fabs(actual[i] - expected[i]);
    if (!(error <= largest)) largest = error;
  }
  CHECK(largest <= rounding, "%s: off by %g", what, largest);
}
template <class T>
constexpr double kRounding = sizeof(T) == 8 ? 1e-13 : 3e-6;

struct Attended {
  Numbers o, lse;
};

// One head. logit(n, m), value(m, c), and which tokens are hidden; `row` counts this head's queries over all heads.
template <class Logit, class Value, class Hidden>
Attended attend(int64_t N, int64_t M, int64_t channels, int64_t row, bool inverted, const Dropout& dropout, Logit logit,
                Value value, Hidden hidden) {
  Numbers p(N * M), o(N * channels), lse(N);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t m = 0; m < M; ++m) p[n * M + m] = hidden(m) ? 0 : std::exp(logit(n, m));
  for (int64_t m = 0; inverted && m < M; ++m) {
    double sum = 0;
    for (int64_t n = 0; n < N; ++n) sum += p[n * M + m];
    for (int64_t n = 0; n < N; ++n) p[n * M + m] = hidden(m) ? 0 : p[n * M + m] / sum;
  }
  for (int64_t n = 0; n < N; ++n) {
    double sum = 0;
    for (int64_t m = 0; m < M; ++m) sum += p[n * M + m];
    lse[n] = std::log(sum);
    if (inverted) sum = std::fmax(sum, 1e-8);
    for (int64_t m = 0; m < M; ++m) {
      if (dropout && lowbias32(dropout.query_hash(row + n) ^ dropout.token_hash(m)) < dropout.threshold) continue;
      for (int64_t c = 0; c < channels; ++c)
        o[n * channels + c] += p[n * M + m] / sum * value(m, c) * (dropout ? dropout.scale() : 1);
    }
  }
  return {o, lse};
}

void append(Numbers& to, const Numbers& more) { to.insert(to.end(), more.begin(), more.end()); }

// Calls of(masked, inverted, dropout, threads) for every kind of call.
template <class Of>
void kinds(Of of) {
  for (bool masked : {false, true})
    for (bool inverted : {false, true})
      for (double probability : {0.0, 0.4})
        for (int count : {1, 3}) of(masked, inverted, Dropout(probability, 12345), threads(count));
}

template <class T>
void grid_of(std::vector<int64_t> sizes, int64_t N, int64_t F) {
  const int64_t B = 2, M = std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<int64_t>());
  const int64_t L = std::accumulate(sizes.begin(), sizes.end(), F);
  const Input<T> q(B * N * L, 1), feat(B * M * F, 2), scale(B * M, 3, 1.5);
  kinds([&](bool masked, bool inverted, const Dropout& dropout, const Parallel& parallel) {
    const Mask mask(B, M, masked);
    const Guarded<T> o(B * N * L), kept(inverted || dropout ? B * N : 0);
    const Guarded<double> lse(B * N), token_lse(inverted ? B * M : 0);
    GridAttentionInput<T> in;
    in.batch = B, in.queries = N, in.features = F, in.heads = 1, in.sizes = sizes;
    in.q = q.data(), in.q_batch_stride = N * L, in.feat = feat.data(), in.scale = scale.data(), in.mask = mask.data();
    in.dropout = dropout, in.inverted = inverted;
    grid_attention_forward<T>(in, {o.data(), lse.data(), kept.size() ? kept.data() : nullptr, token_lse.data()},
                              parallel);
    Numbers exact_o, exact_lse;
    for (int64_t b = 0; b < B; ++b) {
      // [x ; onehot(i_1) ; ..] of token m, times its scale.
      const auto value = [&](int64_t m, int64_t c) {
        const double r = scale[b * M + m];
        if (c < F) return r * feat[(b * M + m) * F + c];
        int64_t inner = M, first = F;
        for (int64_t size : sizes) {
          inner /= size;
          if (c < first + size) return m / inner % size == c - first ? r : 0.0;
          first += size;
        }
        return 0.0;
      };
      const auto logit = [&](int64_t n, int64_t m) {
        double s = 0;
        for (int64_t c = 0; c < L; ++c) s += q[(b * N + n) * L + c] * value(m, c);
        return s;
      };
      const Attended one =
          attend(N, M, L, b * N, inverted, dropout, logit, value, [&](int64_t m) { return mask.hides(b * M + m); });
      append(exact_o, one.o);
      append(exact_lse, one.lse);
    }
    compare(o, exact_o, 2 * kRounding<T>, "o");
    compare(lse, exact_lse, 2 * kRounding<T>, "lse");
  });
}

template <class T>
void grid() {
  const std::vector<int64_t> grids[] = {{1}, {1, 1}, {7}, {2, 5}, {3, 4, 2}, {1, 17}, {5, 33}};
  for (const auto& sizes : grids)
    for (int64_t N : {1, 5, 17})
      for (int64_t F : {1, 3, 6}) grid_of<T>(sizes, N, F);
}

// Points where there are no sizes: there are M of them.
template <class T>
void grid_query_of(std::vector<int64_t> sizes, int64_t M, int64_t N, int64_t F, int64_t C) {
  const int64_t B = 2, H = 2, L = std::accumulate(sizes.begin(), sizes.end(), F);
  const Input<T> tables(B * H * N * L, 1), feat(B * M * F, 2), scale(B * M, 3, 1.5), bias(B * H * N, 4),
      v(B * H * N * C, 5);
  kinds([&](bool masked, bool sum_heads, const Dropout& dropout, const Parallel& parallel) {
    const Mask mask(B, N, masked);
    const int64_t outputs = sum_heads ? 1 : H;
    const Guarded<T> o(B * M * outputs * C);
    const Guarded<double> lse(B * H * M);
    GridQueryInput<T> in;
    in.batch = B, in.heads = H, in.keys = N, in.queries = M, in.features = F, in.channels = C, in.sizes = sizes;
    in.tables = tables.data(), in.feat = feat.data(), in.scale = scale.data(), in.bias = bias.data(), in.v = v.data();
    in.feat_batch_stride = M * F, in.scale_batch_stride = M;
    in.mask = mask.data(), in.dropout = dropout, in.sum_heads = sum_heads;
    grid_query_attention_forward<T>(in, o.data(), M * outputs * C, lse.data(), parallel);
    Numbers exact_o(o.size()), exact_lse;
    for (int64_t head = 0; head < B * H; ++head) {
      const int64_t b = head / H, h = head % H;
      const auto logit = [&](int64_t m, int64_t n) {
        const auto table = [&](int64_t i) { return double(tables[(head * N + n) * L + i]); };
        double s = 0;
        for (int64_t f = 0; f < F; ++f) s += table(f) * feat[(b * M + m) * F + f];
        int64_t inner = M, first = F;
        for (int64_t size : sizes) {
          inner /= size;
          s += table(first + m / inner % size);
          first += size;
        }
        return s * scale[b * M + m] + bias[head * N + n];
      };
      const auto value = [&](int64_t n, int64_t c) { return double(v[(head * N + n) * C + c]); };
      const Attended one = attend(M, N, C, head * M, false, dropout, logit, value,
                                  [&](int64_t n) { return mask.hides(b * N + n); });
      for (int64_t i = 0; i < M * C; ++i) exact_o[((b * M + i / C) * outputs + h % outputs) * C + i % C] += one.o[i];
      append(exact_lse, one.lse);
    }
    compare(o, exact_o, 4 * kRounding<T>, "o");
    compare(lse, exact_lse, 2 * kRounding<T>, "lse");
  });
}

template <class T>
void grid_query() {
  for (int64_t N : {1, 5, 131})
    for (int64_t C : {1, 3, 6, 33}) {
      grid_query_of<T>({1}, 1, N, 0, C);
      grid_query_of<T>({7, 67}, 469, N, 0, C);
      grid_query_of<T>({2, 3, 33}, 198, N, 3, C);
      grid_query_of<T>({2, 1025}, 2050, N, 0, C);
      grid_query_of<T>({}, 35, N, 5, C);
    }
}

template <class T>
void cross_of(int64_t N, int64_t M, int64_t d, int64_t dv) {
  const int64_t B = 2, H = 2;
  const Input<T> q(B * H * N * d, 1), k(B * H * M * d, 2), v(B * H * M * dv, 3);
  const double scale = 0.7;
  kinds([&](bool masked, bool inverted, const Dropout& dropout, const Parallel& parallel) {
    const Mask mask(B, M, masked);
    const Guarded<T> o(B * H * N * dv);
    const Guarded<double> lse(B * H * N), token_lse(inverted ? B * H * M : 0);
    const CrossAttentionInput<T> in{B,
                                    H,
                                    N,
                                    M,
                                    d,
                                    dv,
                                    {q.data(), H * N * d, N * d, d},
                                    {k.data(), H * M * d, M * d, d},
                                    {v.data(), H * M * dv, M * dv, dv},
                                    mask.data(),
                                    scale,
                                    dropout,
                                    inverted};
    cross_attention_forward<T>(in, dense_outputs<T>(in, o.data()), lse.data(), token_lse.data(), parallel);
    Numbers exact_o, exact_lse;
    for (int64_t head = 0; head < B * H; ++head) {
      const auto logit = [&](int64_t n, int64_t m) {
        double s = 0;
        for (int64_t c = 0; c < d; ++c) s += scale * q[(head * N + n) * d + c] * k[(head * M + m) * d + c];
        return s;
      };
      const auto value = [&](int64_t m, int64_t c) { return double(v[(head * M + m) * dv + c]); };
      const Attended one = attend(N, M, dv, head * N, inverted, dropout, logit, value,
                                  [&](int64_t m) { return mask.hides(head / H * M + m); });
      append(exact_o, one.o);
      append(exact_lse, one.lse);
    }
    compare(o, exact_o, kRounding<T>, "o");
    compare(lse, exact_lse, kRounding<T>, "lse");
  });
}

template <class T>
void cross() {
  for (int64_t N : {1, 7, 33})
    for (int64_t M : {1, 2, 129})
      for (int64_t channels : {1, 5, 16}) cross_of<T>(N, M, channels, channels % 7 + 1);
}

// `far` is added to every feature.
template <class T>
void fourier_of(int64_t B, int64_t Bc, int64_t M, int64_t F, int64_t A, int64_t K, int64_t D, double far = 0) {
  const int64_t C = F + A * (2 * K + 1);
  const Input<T> feat(B * M * F, 1), weight(C * D, 2), bias(D, 3);
  const Input<double> coords(Bc * M * A, 4), frequencies(A * K, 5, 20);
  for (int64_t i = 0; i < B * M * F; ++i) feat.array[i] += T(far);
  for (bool normed : {false, true}) {
    for (int64_t x = 0; normed && x < D; ++x) {  // LayerNorm's mean is taken out of the weight
      double mean = 0;
      for (int64_t c = 0; c < C; ++c) mean += weight[c * D + x] / double(C);
      for (int64_t c = 0; c < C; ++c) weight.array[c * D + x] -= T(mean);
    }
    for (int count : {1, 3}) {
      const Guarded<T> out(B * M * D), scale(normed ? B * M : 0);
      fourier_projection_forward<T>(
          {B, Bc, M, F, A, K, D, F ? feat.data() : nullptr, coords.data(), frequencies.data(), weight.data()},
          bias.data(), 1e-5, out.data(), normed ? scale.data() : nullptr, threads(count));
      Numbers exact_out, exact_scale;
      for (int64_t token = 0; token < B * M; ++token) {
        Numbers z;
        for (int64_t f = 0; f < F; ++f) z.push_back(feat[token * F + f]);
        for (int64_t a = 0; a < A; ++a) {
          const double p = coords[token % (Bc * M) * A + a];
          for (int64_t k = 0; k < K; ++k) z.push_back(std::sin(M_PI * p * frequencies[a * K + k]));
          for (int64_t k = 0; k < K; ++k) z.push_back(std::cos(M_PI * p * frequencies[a * K + k]));
          z.push_back(p);
        }
        double mean = 0, variance = 0;
        for (double channel : z) mean += channel / C;
        for (double channel : z) variance += (channel - mean) * (channel - mean) / C;
        const double r = normed ? 1 / std::sqrt(variance + 1e-5) : 1;
        exact_scale.push_back(r);
        for (int64_t x = 0; x < D; ++x) {
          double sum = 0;
          for (int64_t c = 0; c < C; ++c) sum += (z[c] - (normed ? mean : 0)) * weight[c * D + x];
          exact_out.push_back(r * sum + bias[x]);
        }
      }
      compare(out, exact_out, 4 * kRounding<T> * std::sqrt(C) * (normed ? 1 : 1 + far), "out");
      compare(scale, exact_scale, 4 * kRounding<T>, "scale");
    }
  }
}

template <class T>
void fourier() {
  for (int64_t M : {1, 63, 65})
    for (int64_t D : {1, 8, 33}) {
      fourier_of<T>(1, 1, M, 1, 1, 1, D);
      fourier_of<T>(2, 2, M, 3, 2, 5, D);
      fourier_of<T>(3, 1, M, 0, 3, 2, D);
      fourier_of<T>(1, 1, M, 4, 1, 0, D);
      fourier_of<T>(2, 1, M, 40, 1, 2, D, 1000);
      fourier_of<T>(2, 2, M, 65, 0, 0, D, 10000);
    }
}

}  // namespace

extern const Case attention_cases[] = {{"grid_attention, float", grid<float>},
                                       {"grid_attention, double", grid<double>},
                                       {"grid_query_attention, float", grid_query<float>},
                                       {"grid_query_attention, double", grid_query<double>},
                                       {"cross_attention, float", cross<float>},
                                       {"cross_attention, double", cross<double>},
                                       {"fourier_projection, float", fourier<float>},
                                       {"fourier_projection, double", fourier<double>},
                                       {nullptr, nullptr}};
