// Latents as columns of matrices [channels, columns], one a vector lane, so that weights are read as they lie; and the
// chunks of batch elements that go through several steps together while what is between these stays in cache.
//
// Elements of a chunk lie one behind the other, or where a step takes each by itself each at a multiple of the vector's
// lanes. Columns that are no latents begin as zeros, and their gradients are zeros. Where what lies depends on shapes alone,
// not on the instruction set or the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "aligned.h"
#include "latent_kernels.h"
#include "parallel.h"

namespace perceiver_fast {

constexpr int64_t kColumns = 64;         // of a chunk
constexpr int64_t kShareWork = 1 << 19;  // multiply-adds of a thread's share at least
constexpr int64_t kPartChunks = 4;       // of a part of a sum over chunks, whose memory is written and read once more
constexpr int64_t kMostParts = 32;

// The threads that share a step; the caller's alone where there is no other.
struct Team {
  const Parallel* parallel;

  // body(begin, end) for [0, count), cut at multiples of `block`.
  template <class Body>
  void run(int64_t count, int64_t block, int64_t work, const Body& body) const {
    const int64_t blocks = (count + block - 1) / block;
    const int64_t shares = parallel == nullptr ? 1 : std::min({int64_t(parallel->threads), work / kShareWork, blocks});
    if (shares <= 1) return body(0, count);
    parallel->run(shares, [&](int64_t first, int64_t last) {
      body(blocks * first / shares * block, std::min(count, blocks * last / shares * block));
    });
  }
};

// Calls body(i, team) for [0, count): threads share the calls, or where that would leave some idle the steps within each.
template <class Body>
void for_calls(int64_t count, int64_t work, const Parallel& parallel, const Body& body) {
  if ((count < 2 * parallel.threads && count % parallel.threads != 0) || work < kShareWork) {
    for (int64_t i = 0; i < count; ++i) body(i, Team{&parallel});
  } else {
    parallel.run(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i, Team{nullptr});
    });
  }
}

// Parts of a sum over chunks, by their number alone.
inline int64_t parts_of(int64_t chunks) { return std::clamp<int64_t>(chunks / kPartChunks, 1, kMostParts); }

// body(chunk, part, begins, team) for all chunks, those of a part in order.
template <class Body>
void for_parts(int64_t chunks, int64_t work, const Parallel& parallel, const Body& body) {
  const int64_t parts = parts_of(chunks);
  for_calls(parts, work, parallel, [&](int64_t part, Team team) {
    const int64_t first = chunks * part / parts, last = chunks * (part + 1) / parts;
    for (int64_t chunk = first; chunk < last; ++chunk) body(chunk, part, chunk == first, team);
  });
}

// The sum of all parts, each of `size` numbers, in the place of the first.
template <class T>
void add_parts(int64_t parts, int64_t size, T* sums) {
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
}

// Sums of `size` numbers over chunks: body(chunk, sums, begins, team) adds to them, or begins with its own. The parts' sums
// are added in order.
template <class T, class Body>
Aligned<T> sum_chunks(int64_t chunks, int64_t size, int64_t work, const Parallel& parallel, const Body& body) {
  const int64_t parts = parts_of(chunks);
  Aligned<T> memory(parts * size);
  T* const total = memory.get();
  for_parts(chunks, work, parallel, [&](int64_t chunk, int64_t part, bool begins, Team team) {
    body(chunk, total + part * size, begins, team);
  });
  add_parts(parts, size, total);
  return memory;
}

// Latents [batch, N, D] as columns, and products of them. Where they are packed elements lie one behind the other.
template <class T>
class LatentColumns {
 public:
  LatentColumns(int64_t batch, int64_t latents, int64_t channels, bool packed)
      : kernels(latent_kernels<T>(active_isa())),
        batch(batch),
        N(latents),
        D(channels),
        padded_N(padded_columns(latents)),
        spacing(packed ? N : padded_N),
        group(std::min(batch, packed ? packed_group(latents) : std::max<int64_t>(1, kColumns / padded_N))) {}

  // To whole vectors of every instruction set.
  static int64_t padded(int64_t n) {
    constexpr int64_t lanes = 64 / sizeof(T);
    return (n + lanes - 1) / lanes * lanes;
  }

  // Latents of one element. Rows a multiple of 1,024 bytes apart would fall into few sets of the first-level cache, where
  // what runs down the channels finds none of them again: those get a vector more.
  static int64_t padded_columns(int64_t n) {
    const int64_t columns = padded(n);
    return columns * sizeof(T) % 1024 == 0 ? columns + 64 / sizeof(T) : columns;
  }

  // Elements of which a chunk has some kColumns to twice as many columns, the fewest that leave the smallest share unused.
  static int64_t packed_group(int64_t latents) {
    int64_t best = std::max<int64_t>(1, kColumns / latents);
    for (int64_t n = best + 1; n * latents <= 2 * kColumns; ++n)
      if (padded(n * latents) * best < padded(best * latents) * n) best = n;
    return best;
  }

  int64_t chunks() const { return (batch + group - 1) / group; }
  int64_t first(int64_t chunk) const { return chunk * group; }
  int64_t count(int64_t chunk) const { return std::min(group, batch - chunk * group); }
  int64_t columns(int64_t chunk) const { return columns_of(count(chunk)); }
  int64_t columns_before(int64_t chunk) const { return chunk * columns_of(group); }
  int64_t all_columns() const { return columns_before(chunks() - 1) + columns(chunks() - 1); }

  // The elements of a chunk in [batch, N, D], or the one that all share, as [D, columns]; and back.
  void load(int64_t chunk, const T* from, T* to, bool shared = false) const {
    const int64_t C = columns(chunk), n = count(chunk);
    if (n * N != C) std::fill_n(to, D * C, T(0));
    if (spacing == N && !shared) return kernels.transpose(n * N, D, from + first(chunk) * N * D, D, to, C);
    for (int64_t e = 0; e < n; ++e)
      kernels.transpose(N, D, from + (shared ? 0 : first(chunk) + e) * N * D, D, to + e * spacing, C);
  }
  void store(int64_t chunk, const T* from, T* to) const {
    const int64_t C = columns(chunk), n = count(chunk);
    to += first(chunk) * N * D;
    if (spacing == N) return kernels.transpose(D, n * N, from, C, to, D);
    for (int64_t e = 0; e < n; ++e) kernels.transpose(D, N, from + e * spacing, C, to + e * N * D, D);
  }

  // c [rows, columns] = w b, or c += w b, of dense b and c.
  void product(int64_t rows, int64_t columns, int64_t depth, const T* w, int64_t w_row, int64_t w_step, const T* b,
               T* c, Team team, bool accumulate = false) const {
    team.run(rows, 8, rows * columns * depth, [&](int64_t begin, int64_t end) {
      kernels.product(end - begin, columns, depth, w + begin * w_row, w_row, w_step, b, columns, c + begin * columns,
                      columns, accumulate);
    });
  }

  // a^T [columns, padded(channels)] of a [channels, columns].
  void turn(int64_t channels, int64_t columns, const T* a, T* turned) const {
    kernels.transpose(channels, columns, a, columns, turned, padded(channels));
  }

  // sums [rows, padded(channels)] = or += d a^T, of d [rows, columns].
  void outer(int64_t rows, int64_t channels, int64_t columns, const T* d, const T* turned, T* sums, bool begins,
             Team team) const {
    const int64_t row = padded(channels);
    team.run(rows, 8, rows * columns * row, [&](int64_t begin, int64_t end) {
      kernels.product(end - begin, row, columns, d + begin * columns, columns, 1, turned, row, sums + begin * row, row,
                      !begins);
    });
  }

  const LatentKernels<T>& kernels;
  const int64_t batch, N, D, padded_N, spacing, group;  // `spacing` of elements' first columns, `group` elements a chunk

 private:
  int64_t columns_of(int64_t elements) const {
    return spacing == padded_N ? elements * padded_N : padded_columns(elements * N);
  }
};

// The sum of [batch, count] over the batch.
template <class T>
void sum_batch(int64_t batch, int64_t count, const T* from, T* to) {
  std::copy_n(from, count, to);
  for (int64_t b = 1; b < batch; ++b)
    for (int64_t i = 0; i < count; ++i) to[i] += from[b * count + i];
}

// A dense copy of rows that were padded.
template <class T>
void copy_rows(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * from_row, columns, to + r * to_row);
}

}  // namespace perceiver_fast
