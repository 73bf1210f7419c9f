// A call in bfloat16 as one in float: for CPUs without instructions for pairs, and for what those kernels do not take.
#pragma once

#include <algorithm>

#include "aligned.h"
#include "cross_attention.h"
#include "cross_attention_block.h"

namespace perceiver_fast {

// Calls body(b, h, first, last) for runs of rows of all heads.
template <class Body>
void for_rows(int64_t batch, int64_t heads, int64_t rows, const Parallel& parallel, const Body& body) {
  constexpr int64_t kRun = 256;
  const int64_t runs = (rows + kRun - 1) / kRun;
  parallel.run(batch * heads * runs, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / runs, first = i % runs * kRun;
      body(head / heads, head % heads, first, std::min(first + kRun, rows));
    }
  });
}

// Rows of all heads as dense floats.
class WidenedRows {
 public:
  WidenedRows(const HeadMatrix<const BFloat16>& from, int64_t batch, int64_t heads, int64_t rows, int64_t channels,
              const Parallel& parallel)
      : data_(batch * heads * rows * channels), view_(dense_heads<const float>(data_.get(), heads, rows, channels)) {
    const auto& kernels = cross_attention_kernels<float>(active_isa());
    for_rows(batch, heads, rows, parallel, [&](int64_t b, int64_t h, int64_t first, int64_t last) {
      float* to = data_.get() + (b * heads + h) * rows * channels;
      for (int64_t row = first; row < last; ++row) kernels.widen(channels, from.at(b, h, row), to + row * channels);
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
  const auto& kernels = cross_attention_kernels<float>(active_isa());
  for_rows(batch, heads, rows, parallel, [&](int64_t b, int64_t h, int64_t first, int64_t last) {
    const float* of_head = from + (b * heads + h) * rows * channels;
    for (int64_t row = first; row < last; ++row) kernels.narrow(channels, of_head + row * channels, to.at(b, h, row));
  });
}

}  // namespace perceiver_fast
