// Work shared out to torch's threads, where that is faster than the caller alone.
#pragma once

#include <cstdint>
#include <functional>

namespace perceiver_fast {

// body(begin, end) on disjoint ranges that cover [0, n): by torch's threads, or by the caller alone where all threads have
// one processor, and for a while after regions lost time, which every calling thread remembers. The work is the same
// either way, so no bit of the results depends on it.
void run_shared(int64_t n, const std::function<void(int64_t, int64_t)>& body);

}  // namespace perceiver_fast
