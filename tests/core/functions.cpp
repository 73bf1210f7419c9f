// The functions that kernels approximate, for one instruction set: the largest error over many arguments, which must be
// below what the function's comment states, and special values.
#include "../../csrc/core/fourier_encode.h"
#include "../../csrc/core/normal_distribution.h"
#include "check.h"

namespace perceiver_fast {
namespace PF_ISA {
namespace {

#if PF_VECTOR_BYTES > 16 || defined(__aarch64__)
constexpr bool kFused = true;  // multiply-adds round once
#else
constexpr bool kFused = false;
#endif

template <class T>
T bits_to_float(typename Simd<T>::Int bits) {
  T x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Calls body(v, count) with vectors of the arguments next(i), i < count.
template <class T, class Next, class Body>
void for_arguments(int64_t count, Next next, Body body) {
  T lanes[Simd<T>::lanes];
  for (int64_t i = 0; i < count; i += Simd<T>::lanes) {
    for (int lane = 0; lane < Simd<T>::lanes; ++lane) lanes[lane] = next(i + lane < count ? i + lane : count - 1);
    body(Simd<T>::load(lanes));
  }
}

double exact_exp2(float t) { return ::exp2(double(t)); }
long double exact_exp2(double t) { return exp2l(t); }

// 2^t and 2^(t + n) where both are normal numbers, and 2^t again where exp2_within has it.
template <class T>
void add_exp2(typename Simd<T>::Vec t, int n, Largest& largest) {
  const auto p = exp2<T, false>(t, typename Simd<T>::Vec{}), shifted = exp2<T, true>(t, Simd<T>::set(T(n)));
  const auto within = exp2_within<T>(t);
  const double scale = ldexp(1, -n);
  for (int lane = 0; lane < Simd<T>::lanes; ++lane) {
    const auto inverse = 1 / exact_exp2(t[lane]);
    largest.add(fabs(double(p[lane] * inverse - 1)), t[lane]);
    if (fabs(double(t[lane])) <= -double(kLeastExponent<T>)) largest.add(fabs(double(within[lane] * inverse - 1)), t[lane]);
    largest.add(fabs(double(shifted[lane] * scale * inverse - 1)), t[lane]);
  }
}

void exp2_float() {
  Largest largest;
  const auto next = [](int64_t bits) { return bits_to_float<float>(int32_t(bits)); };
  // Every fraction, and every 4001st number whose power is normal.
  for_arguments<float>(
      1 << 23, [&](int64_t i) { return next(0x3f800000 + i); }, [&](auto t) { add_exp2<float>(t, 3, largest); });
  for_arguments<float>(
      0x42ff0000 / 4001, [&](int64_t i) { return next(i * 4001); }, [&](auto t) { add_exp2<float>(t, -7, largest); });
  for_arguments<float>(
      0x42fc0000 / 4001, [&](int64_t i) { return -next(i * 4001); }, [&](auto t) { add_exp2<float>(t, 7, largest); });
  largest.check("exp2, float: relative error", PF_VECTOR_BYTES == 64 ? 1.8e-7 : 2.4e-7);
}

void exp2_double() {
  Largest largest;
  Random random;
  for_arguments<double>(
      1 << 18, [&](int64_t) { return random() * 1015; }, [&](auto t) { add_exp2<double>(t, 7, largest); });
  largest.check("exp2, double: relative error", 2.2e-16);
}

// Powers of zero, infinity and NaN, the range's ends, and large arguments that a shift takes back.
template <class T>
void exp2_special(T least, T most, T large) {
  const FlushDenormals flush;
  const T inf = T(INFINITY);
  const struct {
    T t, n, plain, shifted;  // 2^t and 2^(t + n)
  } rows[] = {{-inf, 5, 0, 0},
              {-inf, -large, 0, 0},
              {most, 0, inf, inf},
              {2 * most, -most, inf, inf},
              {least - T(1.5), 0, 0, 0},
              {-4 * most, most, 0, 0},
              {large, -large, inf, 1},
              {-large, large, 0, 1},
              {4 * large, -4 * large, inf, 1},
              {large + T(0.5), -large, inf, T(1.4142135623730951)},
              {-large - T(0.5), large, 0, T(0.7071067811865476)},
              {T(NAN), 0, T(NAN), T(NAN)},
              {0, 0, 1, 1},
              {-0.0f, -2, 1, T(0.25)}};
  for (const auto& row : rows) {
    const auto t = Simd<T>::set(row.t), n = Simd<T>::set(row.n);
    const T plain = exp2<T, false>(t, n)[0], shifted = exp2<T, true>(t, n)[0];
    const auto near = [](T a, T b) {
      return a == b || (a != a && b != b) || fabs(double(a - b)) <= 2.5e-7 * double(b);
    };
    CHECK(near(plain, row.plain), "2^%g is %g", double(row.t), double(plain));
    CHECK(near(shifted, row.shifted), "2^(%g + %g) is %g", double(row.t), double(row.n), double(shifted));
  }
  const auto infinite = Simd<T>::set(inf), none = typename Simd<T>::Vec{};
  const T plain = exp2<T, false>(infinite, none)[0], shifted = exp2<T, true>(infinite, none)[0];
  CHECK(plain == inf && !(shifted < inf), "2^inf is %g, with a shift %g", double(plain), double(shifted));
  const T zero = exp2_within<T>(Simd<T>::set(kLeastExponent<T>))[0], nan = exp2_within<T>(Simd<T>::set(T(NAN)))[0];
  CHECK(zero == 0 && nan != nan, "the least power is %g, that of NaN %g", double(zero), double(nan));
}

void exp2_limits() {
  exp2_special<float>(-126, 128, 4194304);
  exp2_special<double>(-1022, 1024, 2251799813685248.0);
}

// Sine and cosine of pi p f, with the phase reduced in long double and its product taken in two parts.
void exact_sin_cos(double p, double f, double& sine, double& cosine) {
  const double product = p * f, rest = ::fma(p, f, -product);
  const long double reduced = (long double)fmod(product, 2.0) + rest;
  const int quarter = int(rintl(reduced * 2));
  const long double angle = (reduced - quarter / 2.0L) * 3.14159265358979323846264338327950288L;
  const double s = double(sinl(angle)), c = double(cosl(angle));
  const int n = quarter & 3;
  sine = n == 0 ? s : n == 1 ? c : n == 2 ? -s : -c;
  cosine = n == 0 ? c : n == 1 ? -s : n == 2 ? -c : s;
}

// Phases p f over the whole range of p in [-1, 1], and small ones.
template <class T>
void check_sin_cos(double frequency, int64_t count, double absolute, double relative) {
  constexpr int lanes = Simd<T>::lanes;
  Largest largest, largest_relative;
  Random random;
  for (int64_t i = 0; i < count; i += lanes) {
    double p[lanes], twice_p[lanes], exact[2];
    T sine[lanes], cosine[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
      p[lane] = random() * (i < count / 2 ? 1 : fmin(1, 1 / frequency));
      twice_p[lane] = 2 * p[lane];
    }
    sin_cos(twice_p, Simd<double>::set(frequency), sine, cosine);
    for (int lane = 0; lane < lanes; ++lane) {
      exact_sin_cos(p[lane], frequency, exact[0], exact[1]);
      for (int which = 0; which < 2; ++which) {
        const double error = fabs(double(which ? cosine[lane] : sine[lane]) - exact[which]), size = fabs(exact[which]);
        largest.add(error, p[lane] * frequency);
        // Of tiny numbers the reference has few digits.
        if (size > (sizeof(T) == 4 ? 1e-9 : 1e-3)) largest_relative.add(error / size, p[lane] * frequency);
      }
    }
  }
  printf("  at frequency %g\n", frequency);
  largest.check(sizeof(T) == 4 ? "sin_cos, float: absolute error" : "sin_cos, double: absolute error", absolute);
  largest_relative.check(sizeof(T) == 4 ? "sin_cos, float: relative error" : "sin_cos, double: relative error",
                         relative);
}

void sines_special() {
  constexpr int lanes = Simd<float>::lanes;
  const double positions[] = {0, INFINITY, -INFINITY, NAN};
  for (double position : positions) {
    double twice_p[lanes];
    float sine[lanes], cosine[lanes];
    for (int lane = 0; lane < lanes; ++lane) twice_p[lane] = 2 * position;
    sin_cos(twice_p, Simd<double>::set(3), sine, cosine);
    const bool right = position == 0 ? sine[0] == 0 && cosine[0] == 1 : sine[0] != sine[0] && cosine[0] != cosine[0];
    CHECK(right, "sine and cosine at %g are %g and %g", position, double(sine[0]), double(cosine[0]));
  }
}

// Without fused multiply-adds the phase itself is rounded: an error of its own, in proportion to p f.
void sines() {
  for (double frequency : {0.5, 1.0, 112.0, 4321.987, kFused ? 0.999 * 0x1p50 : 0x1p24}) {
    const double phase = kFused ? 0 : frequency * 4e-16;
    const bool relative = kFused || frequency <= 1;
    check_sin_cos<float>(frequency, 1 << 19, (kFused ? 8e-8 : 9e-8) + phase,
                         relative ? (kFused ? 1.2e-7 : 1.7e-7) : INFINITY);
    check_sin_cos<double>(frequency, 1 << 16, 1.2e-16 + phase, relative ? 4e-16 : INFINITY);
  }
}

void normal_float() {
  Largest below, gelu, density, tail;
  const auto add = [&](Simd<float>::Vec g) {
    const Normal<float> of = normal(g);
    for (int lane = 0; lane < Simd<float>::lanes; ++lane) {
      const double x = g[lane], phi = 0.5 * erfc(-x * 0.70710678118654752440),
                   exact = exp(-0.5 * x * x) * kInverseSqrt2Pi;
      below.add(fabs(of.below[lane] - phi), x);
      density.add(fabs(of.density[lane] - exact), x);
      gelu.add(fabs(x * of.below[lane] - x * phi) / fmax(fabs(x), 1e-30), x);
      if (x < 0 && x > -12) tail.add(fabs(of.below[lane] / phi - 1), x);
    }
  };
  // Every 1021st float of up to 32, of both signs.
  for_arguments<float>(0x42000000 / 1021, [](int64_t i) { return bits_to_float<float>(int32_t(i * 1021)); }, add);
  for_arguments<float>(0x42000000 / 1021, [](int64_t i) { return -bits_to_float<float>(int32_t(i * 1021)); }, add);
  below.check("normal, float: Phi's absolute error", 1.5e-7);
  density.check("normal, float: density's absolute error", 1e-7);
  gelu.check("normal, float: g Phi(g)'s error over g", 1.5e-7);
  tail.check("normal, float: Phi's relative error below zero", 1e-5);
}

template <class T>
void normal_special(T bound) {
  const struct {
    T g, below, density;
  } rows[] = {{0, T(0.5), T(kInverseSqrt2Pi)},
              {T(-0.0), T(0.5), T(kInverseSqrt2Pi)},
              {T(INFINITY), 1, 0},
              {-T(INFINITY), 0, 0},
              {T(1e30), 1, 0},
              {T(-1e30), 0, 0},
              {T(NAN), T(NAN), T(NAN)}};
  for (const auto& row : rows) {
    const Normal<T> of = normal(Simd<T>::set(row.g));
    const auto near = [&](T a, T b) { return (a != a && b != b) || fabs(double(a - b)) <= bound; };
    CHECK(near(of.below[0], row.below), "Phi(%g) is %g", double(row.g), double(of.below[0]));
    CHECK(near(of.density[0], row.density), "the density at %g is %g", double(row.g), double(of.density[0]));
  }
}

void normal_limits() {
  const FlushDenormals flush;
  normal_special<float>(1e-7f);
  normal_special<double>(1e-15);
}

}  // namespace

extern const Case functions_cases[] = {{"exp2, float", exp2_float},        {"exp2, double", exp2_double},
                                       {"exp2, limits", exp2_limits},      {"sin_cos", sines},
                                       {"sin_cos, limits", sines_special}, {"normal, float", normal_float},
                                       {"normal, limits", normal_limits},  {nullptr, nullptr}};

}  // namespace PF_ISA
}  // namespace perceiver_fast
