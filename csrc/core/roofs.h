// What this CPU can do at most: rates that the kernels' counted work is held against.
#pragma once

#include <cstdint>

#include "kernel_tables.h"

namespace perceiver_fast {

struct Roofs {
  double multiply_adds;  // fused multiply-adds of floats a second, operands in registers
  double exponentials;   // exp2 of floats a second, the kernels' polynomial
  double copied_bytes;   // bytes read and bytes written a second by a copy that no cache holds
};

// Loops of one instruction set: both do `rounds` times `step` operations and return what depends on all of them.
template <class T>
struct RoofsKernels {
  T (*multiply_adds)(int64_t rounds);
  T (*exponentials)(int64_t rounds);
  int64_t multiply_adds_step, exponentials_step;
};

PF_KERNEL_TABLES(RoofsKernels, roofs)

// Of `threads` threads together; takes about half a second. Throws std::invalid_argument below one thread.
Roofs measure_roofs(Isa isa, int threads);

}  // namespace perceiver_fast
