// Products on tensor cores in bf16 and TF32 with float32 sums, and what lanes hold of their operands.
//
// mma(d, a, b0, b1, c) is a warp's D [16, 8] = A [16, 16] B [16, 8] + C. Lane 4 g + t holds words of two bf16, the first
// in the low half, and four floats:
//
//   a      A[g][2t ..], A[g + 8][2t ..], A[g][2t + 8 ..], A[g + 8][2t + 8 ..]
//   b0 b1  B[2t ..][g], B[2t + 8 ..][g]
//   c, d   C[g][2t], C[g][2t + 1], C[g + 8][2t], C[g + 8][2t + 1]
//
// Four floats that are packed in pairs are thus two words of an A.
#pragma once

#include <cstdint>

namespace perceiver_fast {

constexpr uint32_t kBf16One = 0x3f80;

// Both rounded to the nearest bf16, ties to even.
inline __device__ uint32_t pack_bf16(float first, float second) {
#ifdef __CUDACC__
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  return emulation::bf16_bits(first) | emulation::bf16_bits(second) << 16;
#endif
}

// Both cut off, which is exact for numbers that are bf16.
inline __device__ uint32_t pack_exact(float first, float second) {
  return __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x7632);
}

inline __device__ float to_bf16(float x) { return __uint_as_float(pack_bf16(x, 0) << 16); }
inline __device__ float cut_off(float x) { return __uint_as_float(__float_as_uint(x) & 0xffff0000u); }

// A float32 in three pieces of bf16 whose sum it is.
struct Pieces {
  float first, second, third;

  // Eight digits each: the fewest instructions.
  static __device__ Pieces cut(float x) {
    const float first = cut_off(x), rest = x - first, second = cut_off(rest);
    return {first, second, rest - second};
  }
  // The first piece, and the first two, as near as they can be.
  static __device__ Pieces rounded(float x) {
    const float first = to_bf16(x), rest = x - first, second = to_bf16(rest);
    return {first, second, rest - second};
  }
};

// A float16, given by its bits.
inline __device__ float from_float16(uint32_t bits) {
#ifdef __CUDACC__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(uint16_t(bits)));
  return x;
#else
  return emulation::from_float16(bits);
#endif
}

// TF32 is a float32 whose last 13 bits are zero: rounded to the nearest, and cut off.
inline __device__ uint32_t to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits & 0xffffe000u;  // which PTX leaves open
#else
  return x != x ? 0x7fffe000u : (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
#endif
}
inline __device__ float cut_to_tf32(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

// 2^x to 2^-22, and zero for results below 2^-126.
inline __device__ float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulation::flushed(exp2f(x));
#endif
}

// All lanes of a warp take part: volatile, so that it is not moved to where only some of them need the result.
inline __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  emulation::mma(d, a, b0, b1, c);
#endif
}

// The same in TF32, of A [16, 8] and B [8, 8]. Lanes hold of them, with c and d as above:
//
//   a      A[g][t], A[g + 8][t], A[g][t + 4], A[g + 8][t + 4]
//   b0 b1  B[t][g], B[t + 4][g]
//
// With columns t and t + 4 of A for columns 2t and 2t + 1 of a sum, numbers 0, 2, 1 and 3 of that sum are an A.
inline __device__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  emulation::mma_tf32(d, a, b0, b1, c);
#endif
}

}  // namespace perceiver_fast
