// How a driver reaches the kernels that were compiled once per instruction set.
//
// A translation unit <op>_<isa>.cpp defines <op>_<isa>_f32 and <op>_<isa>_f64, tables of type Table<float> and
// Table<double>; PF_KERNEL_TABLES(Table, op) in the driver defines op_kernels<T>(isa), which picks one. An op made for
// other types than these has a PF_KERNEL_TABLE(Table, op, T, type) for each, its tables named <op>_<isa>_<type>.
#pragma once

#include "isa.h"

#if defined(__x86_64__)
#define PF_DECLARE_X86_TABLES(Table, op, T, type) \
  extern const Table<T> op##_avx2_##type;         \
  extern const Table<T> op##_avx512_##type;
#define PF_PICK_X86_TABLE(op, type)                  \
  if (isa == Isa::avx512) return op##_avx512_##type; \
  if (isa == Isa::avx2) return op##_avx2_##type;
#else
#define PF_DECLARE_X86_TABLES(Table, op, T, type)
#define PF_PICK_X86_TABLE(op, type) (void)isa;
#endif

#define PF_KERNEL_TABLE(Table, op, T, type)    \
  extern const Table<T> op##_baseline_##type;  \
  PF_DECLARE_X86_TABLES(Table, op, T, type)    \
  template <>                                  \
  const Table<T>& op##_kernels<T>(Isa isa) {   \
    PF_PICK_X86_TABLE(op, type)                \
    return op##_baseline_##type;               \
  }

#define PF_KERNEL_TABLES(Table, op)       \
  PF_KERNEL_TABLE(Table, op, float, f32)  \
  PF_KERNEL_TABLE(Table, op, double, f64)
