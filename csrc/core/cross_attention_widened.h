// A call in bfloat16 as one in float: for CPUs without instructions for pairs, and for what those kernels do not take.
#pragma once

#include "aligned.h"
#include "cross_attention.h"

namespace perceiver_fast {

// Rows of all heads as dense floats.
class WidenedRows {
 public:
  WidenedRows(const HeadMatrix<const BFloat16>& from, int64_t batch, int64_t heads, int64_t rows, int64_t channels,
              const Parallel& parallel)
      : data_(batch * heads * rows * channels), view_(dense_heads<const float>(data_.get(), heads, rows, channels)) {
    parallel.run(batch * heads * rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const BFloat16* row = from.at(i / rows / heads, i / rows % heads, i % rows);
        for (int64_t c = 0; c < channels; ++c) data_.get()[i * channels + c] = widened(row[c]);
      }
    });
  }
  const HeadMatrix<const float>& view() const { return view_; }

 private:
  const Aligned<float> data_;
  const HeadMatrix<const float> view_;
};

class Widened {
 public:
  Widened(const CrossAttentionInput<BFloat16>& in, const Parallel& parallel)
      : q_(in.q, in.batch, in.heads, in.queries, in.dim, parallel),
        k_(in.k, in.batch, in.heads, in.tokens, in.dim, parallel),
        v_(in.v, in.batch, in.heads, in.tokens, in.dim_v, parallel),
        input_{in.batch, in.heads,  in.queries, in.tokens, in.dim,     in.dim_v,   q_.view(),
               k_.view(), v_.view(), in.mask,    in.scale,  in.dropout, in.inverted} {}
  const CrossAttentionInput<float>& input() const { return input_; }

 private:
  const WidenedRows q_, k_, v_;
  const CrossAttentionInput<float> input_;
};

// Rows of all heads, dense, rounded to where they belong.
inline void narrow_rows(const float* from, int64_t batch, int64_t heads, int64_t rows, int64_t channels,
                        const HeadMatrix<BFloat16>& to, const Parallel& parallel) {
  parallel.run(batch * heads * rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      BFloat16* row = to.at(i / rows / heads, i / rows % heads, i % rows);
      for (int64_t c = 0; c < channels; ++c) row[c] = narrowed<BFloat16>(from[i * channels + c]);
    }
  });
}

}  // namespace perceiver_fast
