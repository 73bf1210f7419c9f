// How drivers reach kernels that were compiled once for every instruction set.
//
// <op>_kernels.cpp is compiled for each of them, with PF_ISA its name and PF_VECTOR_BYTES the size of its vectors. It
// defines PF_ISA::<op>_table<T>(), the table of the op's kernels, and instantiates it for the types T that there are
// kernels for. PF_KERNEL_TABLES(Table, op), in the header that defines Table, declares these functions and defines
// <op>_kernels<T>(isa), which calls one of them.
#pragma once

#include "isa.h"

#define PF_DECLARE_TABLE(Table, op, isa) \
  namespace isa {                        \
  template <class T>                     \
  const Table<T>& op##_table();          \
  }

#if defined(__x86_64__)
#define PF_DECLARE_X86_TABLES(Table, op) \
  PF_DECLARE_TABLE(Table, op, avx2)      \
  PF_DECLARE_TABLE(Table, op, avx512)
#define PF_PICK_X86_TABLE(op)                             \
  if (isa == Isa::avx512) return avx512::op##_table<T>(); \
  if (isa == Isa::avx2) return avx2::op##_table<T>();
#else
#define PF_DECLARE_X86_TABLES(Table, op)
#define PF_PICK_X86_TABLE(op) (void)isa;
#endif

#define PF_KERNEL_TABLES(Table, op)          \
  PF_DECLARE_TABLE(Table, op, baseline)      \
  PF_DECLARE_X86_TABLES(Table, op)           \
  template <class T>                         \
  const Table<T>& op##_kernels(Isa isa) {    \
    PF_PICK_X86_TABLE(op)                    \
    return baseline::op##_table<T>();        \
  }
