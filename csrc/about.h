// What libperceiver_fast.so tells about itself, to the Python module and to programs without Python. In C, and nothing is
// thrown: whoever calls may have been built with another C++ library.
#pragma once

#define PF_API extern "C" __attribute__((visibility("default")))

// The instruction set that the kernels run on: "avx512", "avx2" or "baseline". Null, and a message in *error, where
// PERCEIVER_FAST_CPU_ISA asks for one that cannot run.
PF_API const char* perceiver_fast_active_isa(const char** error) noexcept;

// Instruction sets that were compiled in and that this CPU has, slowest first, with spaces between them.
PF_API const char* perceiver_fast_available_isas() noexcept;

// Multiply-adds, exponentials and copied bytes a second that `threads` threads reach together, measured for half a
// second. Returns null, or a message where it cannot be.
PF_API const char* perceiver_fast_roofs(int threads, double* rates) noexcept;

// How many of the threads that torch runs the calling thread's work on can run at once (cpu/cores.h); zero where that cannot be found out.
PF_API int perceiver_fast_team_cores() noexcept;
