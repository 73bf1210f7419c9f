// What a token brings to the weights of all queries, for masks, inverted attention and dropout.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dropout.h"

namespace perceiver_fast {

constexpr double kLog2OfE = 1.4426950408889634;

// The normaliser of inverted attention is at least this, as torch.nn.functional.normalize has it in perceiver-pytorch.
constexpr double kInvertedEps = 1e-8;

// The logarithm of inverted attention's sum over the tokens, before it is bounded below by kInvertedEps: a part of the
// tokens may have a smaller sum than all of them. It is the softmax's log-sum-exp in all else.
template <class T>
double inverted_lse(double sum) {
  return std::log(std::max(sum, double(std::numeric_limits<T>::min())));
}
inline bool is_clamped(double inverted_lse) { return inverted_lse <= std::log(kInvertedEps); }
// What the gradient of such a logarithm is multiplied by, to be added to those of weights that kInvertedEps divides.
inline double clamped_share(double inverted_lse) { return std::exp(std::log(kInvertedEps) - inverted_lse); }

// The log-sum-exp of a query whose tokens are all masked: perceiver_fast/reference/softmax.py has the same.
constexpr double kEmptyLse = -double(std::numeric_limits<float>::max());

// `shift`, an integer or -inf (a masked token), is added to the exponents of a token's weights, and the weights are
// multiplied by `weight`. In that way inverted attention divides by the softmax's denominator over the queries, exactly
// for logits of any size. Its backward subtracts `delta` and then `delta_low`, the rounding error of delta, from the
// gradients of the weights: where one query has all of a token's weight, the difference is nothing but rounding
// otherwise. (A query's own sum is rounded once. A query that attends to a token which belongs to others nearly
// entirely gets its gradients to a few 1e-5 of the whole.) All these vectors are empty when nothing needs them. `hashes` are
// dropout's.
template <class T>
struct TokenTerms {
  std::vector<T> shift, weight, delta, delta_low;
  std::vector<uint32_t> hashes;
  std::vector<char> uniform;  // [batch]: every token is masked, and so none of these is

  // `mask` [batch, tokens] and `token_lse` [batch * heads, tokens] may be null.
  TokenTerms(int64_t batch, int64_t heads, int64_t tokens, const uint8_t* mask, const double* token_lse,
             const Dropout& dropout)
      : tokens_(tokens), heads_(heads), per_head_(token_lse != nullptr) {
    uniform.assign(batch, 0);  // inverted attention gives an element that is all masked no weight at all
    for (int64_t b = 0; b < batch && mask != nullptr && !per_head_; ++b)
      uniform[b] = std::none_of(mask + b * tokens, mask + (b + 1) * tokens, [](uint8_t m) { return m != 0; });
    if (mask == nullptr && token_lse == nullptr && !dropout) return;
    const int64_t count = (per_head_ ? batch * heads : batch) * tokens;
    shift.assign(count, T(0));
    weight.assign(count, T(1));
    delta.assign(count, T(0));
    delta_low.assign(count, T(0));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = i / tokens / (per_head_ ? heads : 1);
      if (mask != nullptr && !mask[b * tokens + i % tokens] && !uniform[b]) {
        shift[i] = -std::numeric_limits<T>::infinity();
      } else if (token_lse != nullptr) {
        const double lse2 = token_lse[i] * kLog2OfE;
        shift[i] = T(-std::nearbyint(lse2));
        weight[i] = T(std::exp2(-lse2 - double(shift[i])));
      }
    }
    if (!dropout) return;
    hashes.resize(tokens);
    for (int64_t m = 0; m < tokens; ++m) hashes[m] = dropout.token_hash(m);
  }

  bool empty() const { return shift.empty(); }
  // Where the tokens of a head (counted over the batch) start.
  int64_t row(int64_t head) const { return (per_head_ ? head : head / heads_) * tokens_; }

 private:
  int64_t tokens_, heads_;
  bool per_head_;
};

}  // namespace perceiver_fast
