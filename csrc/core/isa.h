// Which instruction sets the kernels were compiled for, and which one this process runs.
// Chosen once: the best the CPU has, or what PERCEIVER_FAST_CPU_ISA asks for.
#pragma once

#include <string>
#include <vector>

namespace perceiver_fast {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

const char* isa_name(Isa isa);

// Instruction sets that were compiled in and that this CPU can run, slowest first.
std::vector<Isa> available_isas();

// Whether pairs of bfloat16 are multiplied by instructions of avx512_bf16 (pairs.h): avx512 is in use, the CPU has them, and
// it has no tiles for products (AMX), beside which they were not measured.
bool multiplies_bfloat16_pairs();

// The instruction set in use. Throws std::runtime_error when PERCEIVER_FAST_CPU_ISA names one that
// is unknown, was not compiled in, or that this CPU lacks.
Isa active_isa();

}  // namespace perceiver_fast
