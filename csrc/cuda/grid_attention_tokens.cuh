// Tokens of a chunk in shared memory, as second operands of both products, and what goes with them: how channels of a
// dtype are multiplied.
//
//           keys                          weights and values
//   bf16    x as it is                    in bf16: 16 tokens a product
//   fp16    x in two pieces of bf16       in TF32: float32's range, and one more digit than float16; 8 tokens a product
//
// Nothing is ever float16: weights are exp2 of logits without a maximum, and gradients may be of any size.
#pragma once

#include "grid_attention_tiles.cuh"

namespace perceiver_fast {

// Which piece of a query's number and which of a token's a term multiplies, as many of them a channel as 12 terms hold.
// Left out are, of float16 with three channels, products below 2^-16 of the number.
template <int F, bool kFloat16>
struct ChannelTerms {
  static constexpr int each = !kFloat16 ? 3 : 12 / F < 6 ? 12 / F : 6, count = each * F;
  static __device__ constexpr int of_query(int k) { return !kFloat16 ? k / F : k / F < 4 ? k / F % 2 : 2; }
  static __device__ constexpr int of_token(int k) { return !kFloat16 ? 0 : k / F < 4 ? k / F / 2 : k / F - 4; }
};

// Of a row a lane reads two vectors of keys and two of scales, which it shares, and of values one, or of fp16 two.
template <int F, bool kFloat16>
struct TokenChunk {
  using Terms = ChannelTerms<F, kFloat16>;
  static_assert(Terms::count <= 12, "the channels' terms have to fit");
  static constexpr int group = F < 4 ? 4 : 2;  // rows whose sums a product holds apart, in columns F + 1 ..

  // Where the vectors of lane 4g + t lie. One of 36 is skipped after every eight, or threads that fill them would meet in a
  // few banks.
  static constexpr int kSlots = 36;
  static __device__ int slot(int g, int t) { return 4 * g + t + g / 2; }

  struct alignas(16) Row {
    uint32_t keys[kTileColumns / 16][kSlots][2][2];  // [16 columns][slot][8 of them]: terms 2t, 2t + 1 and 2t + 8, 2t + 9
    // Lane 4g + t has column g of values 2t and 2t + 1 of 8 columns: in bf16 [slot][8 columns], two in a word, and in fp16
    // [16 columns][slot][8 of them][2].
    uint32_t values[kFloat16 ? 2 : 1][kSlots][4];
    float scales[kTileColumns / 16][4][2][2];  // [16 columns][t][8 of them], times log2(e)
  };
  Row rows[kChunk];

  // Two neighbours in global memory, which a thread makes. It reads them before the barrier that lets it write, and all
  // at once: what lies beyond the last row or column, or is masked, reads something that is there.
  struct Raw {
    uint32_t x[2][F];
    float scale[2];
    bool there[2];

    __device__ Raw(const GridCall& call, const TilePlace& at, int i0) {
      const int i = i0 + threadIdx.x / (kTileColumns / 2), j = at.j0 + threadIdx.x % (kTileColumns / 2) * 2;
      const int64_t row = (at.b * call.rows + min(i, call.rows - 1)) * call.columns;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t token = row + min(j + h, call.columns - 1);
        there[h] = i < call.rows && j + h < call.columns && (!call.mask || call.mask[token]);
        scale[h] = call.scale[token];
#pragma unroll
        for (int f = 0; f < F; ++f) x[h][f] = call.feat[token * F + f];
      }
    }
  };

  __device__ void fill(const Raw& raw) {
    constexpr float log2_e = 1.44269504088896341f;
    const int row = threadIdx.x / (kTileColumns / 2), pair = threadIdx.x % (kTileColumns / 2);
    const int half = pair / 4 % 2, t = pair % 4;
    Row& to = rows[row];
    float x[2][F], r[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool there = raw.there[h];
      r[h] = there ? raw.scale[h] * log2_e : 1.0f;
      uint32_t pieces[2][F];
#pragma unroll
      for (int f = 0; f < F; ++f) {
        const uint32_t bits = there ? raw.x[h][f] : 0;
        x[h][f] = kFloat16 ? from_float16(bits) : __uint_as_float(bits << 16);
        pieces[0][f] = kFloat16 ? pack_bf16(x[h][f], 0) : bits;
        pieces[1][f] = kFloat16 ? __float_as_uint(x[h][f] - __uint_as_float(pieces[0][f] << 16)) >> 16 : 0;
      }
      const auto term = [&](int k) { return k < Terms::count ? pieces[Terms::of_token(k)][k % F] : 0u; };
      const auto word = [&](int w) { return term(2 * w) | term(2 * w + 1) << 16; };
      const auto put = [&](int lane, uint32_t first, uint32_t second) {
        uint32_t(&key)[2] = to.keys[pair / 8][slot(2 * t + h, lane)][half];
        key[0] = first, key[1] = second;
      };
      put(0, word(0), word(4)), put(1, word(1), word(5));
      put(2, word(2), (there ? 0u : kBf16One) | kBf16One << 16), put(3, word(3), kBf16One | kBf16One << 16);
    }
    to.scales[pair / 8][t][half][0] = r[0], to.scales[pair / 8][t][half][1] = r[1];
#pragma unroll
    for (int c = 0; c < 8; ++c) {  // x r, one, and r in the column of its row, in pairs
      const bool here = c - F - 1 == row % group;
      if constexpr (kFloat16) {
        uint32_t* value = &to.values[pair / 8][slot(c, t)][2 * half];
#pragma unroll
        for (int h = 0; h < 2; ++h)
          value[h] = c == F ? __float_as_uint(1.0f) : to_tf32(c < F ? x[h][c % F] * r[h] : here ? r[h] : 0.0f);
      } else {
        uint32_t& value = to.values[0][slot(c, t)][pair / 4];
        if (c < F) value = pack_bf16(x[0][c % F] * r[0], x[1][c % F] * r[1]);
        else value = c == F ? kBf16One | kBf16One << 16 : here ? pack_bf16(r[0], r[1]) : 0;
      }
    }
  }
};

// What a lane reads of a row of a chunk.
template <int F, bool kFloat16>
struct RowReader {
  using Chunk = TokenChunk<F, kFloat16>;
  static constexpr int kStep = sizeof(typename Chunk::Row) / 4, kVectors = 4 * Chunk::kSlots;
  const uint32_t* vectors;
  const float* scales;

  __device__ explicit RowReader(const Chunk& chunk) {
    const int lane = threadIdx.x % 32, slot = Chunk::slot(lane / 4, lane % 4);
    vectors = settled(chunk.rows[0].keys[0][slot][0]), scales = settled(chunk.rows[0].scales[0][lane % 4][0]);
  }
  __device__ uint4 keys(int i, int which) const { return read<uint4>(vectors + i * kStep + which * kVectors); }
  __device__ float4 scale(int i, int which) const { return read<float4>(scales + i * kStep + which * 16); }
  // Of 16 columns: two words in bf16, and four in TF32.
  __device__ auto values(int i, int which) const {
    const uint32_t* values = vectors + i * kStep + 2 * kVectors;
    if constexpr (kFloat16) return read<uint4>(values + which * kVectors);
    else return read<uint2>(values + which * 2);
  }
};

// A lane's keys and scales of 16 columns of a row, in two halves.
struct SixteenTokens {
  uint4 keys;
  float4 scales;

  template <class Reader>
  __device__ SixteenTokens(const Reader& reader, int i, int which)
      : keys(reader.keys(i, which)), scales(reader.scale(i, which)) {}

  // A half's products with the keys, on top of c.
  __device__ void multiply(float (&s)[4], const uint32_t (&a)[4], int half, const float (&c)[4]) const {
    mma(s, a, half ? keys.z : keys.x, half ? keys.w : keys.y, c);
  }
  // Of number c that a lane holds of a half's sums.
  __device__ float scale(int half, int c) const {
    return half ? (c % 2 ? scales.w : scales.z) : (c % 2 ? scales.y : scales.x);
  }
};

// What a lane has of weights, or of gradients, of 16 queries and 16 tokens: the first operand of products with values.
template <bool kFloat16>
struct Weights;

template <>
struct Weights<false> {
  uint32_t words[4];

  static __device__ float kept(float weight) { return weight; }
  __device__ void put(int half, const float (&s)[4]) {
    words[2 * half] = pack_bf16(s[0], s[1]), words[2 * half + 1] = pack_bf16(s[2], s[3]);
  }
  __device__ void add(float (&acc)[4], const uint2& values) const { mma(acc, words, values.x, values.y, acc); }
};

// Tensor cores do not look at digits that TF32 has not, or may not: `kept` takes them off, and all sums are of the same
// weights.
template <>
struct Weights<true> {
  uint32_t words[2][4];

  static __device__ float kept(float weight) { return cut_to_tf32(weight); }
  __device__ void put(int half, const float (&s)[4]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) words[half][c] = __float_as_uint(s[c % 2 * 2 + c / 2]);
  }
  __device__ void add(float (&acc)[4], const uint4& values) const {
    mma_tf32(acc, words[0], values.x, values.y, acc), mma_tf32(acc, words[1], values.z, values.w, acc);
  }
};

}  // namespace perceiver_fast
