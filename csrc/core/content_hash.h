// A hash of a tensor's memory that is quick enough to be asked before every use of what was computed from it.
#pragma once

#include <cstdint>
#include <cstring>

namespace perceiver_fast {

// Hashes all 8-byte words of up to 8 KiB, of more memory some 1,024 words in evenly spread lines of eight, and in
// either case the last bytes.
inline uint64_t content_hash(const unsigned char* memory, int64_t bytes) {
  constexpr int64_t kWord = 8, kLine = 64, kLines = 128;
  // Four hashes side by side, so that their multiplications overlap. Each step is a bijection of the hash, so a change
  // of one word changes the result.
  uint64_t lanes[4] = {uint64_t(bytes), 1, 2, 3};
  const auto add = [&](int64_t offset, int64_t size, int lane) {
    uint64_t word = 0;
    std::memcpy(&word, memory + offset, size);
    uint64_t& h = lanes[lane & 3];
    h = (h ^ word) * 0x9e3779b97f4a7c15u;
    h ^= h >> 29;
  };
  const int64_t lines = bytes / kLine, step = lines > kLines ? lines / kLines : 1;
  for (int64_t line = 0; line < lines; line += step)
    for (int64_t word = 0; word < kLine / kWord; ++word) add(line * kLine + word * kWord, kWord, int(word));
  for (int64_t offset = lines * kLine; offset < bytes; offset += kWord)
    add(offset, bytes - offset < kWord ? bytes - offset : kWord, int(offset / kWord));
  uint64_t hash = 0;
  for (uint64_t lane : lanes) hash = (hash ^ lane) * 0x9e3779b97f4a7c15u, hash ^= hash >> 32;
  return hash;
}

}  // namespace perceiver_fast
