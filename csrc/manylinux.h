// Included before every source of a wheel for many Linux releases (PERCEIVER_FAST_MANYLINUX): what new releases of glibc
// and libstdc++ have is taken in its old form, or is here.
#pragma once

#include <bits/c++config.h>

#include <new>

// Templates of libstdc++ that the oldest release has not are compiled in.
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0

// glibc 2.29 has these anew, without setting errno; the old ones compute the same.
#if defined(__x86_64__)
#define PF_OLD(name) __asm__(".symver " #name "," #name "@GLIBC_2.2.5")
#elif defined(__aarch64__)
#define PF_OLD(name) __asm__(".symver " #name "," #name "@GLIBC_2.17")
#endif
PF_OLD(exp);
PF_OLD(log);
PF_OLD(exp2);
PF_OLD(log2);
PF_OLD(pow);

#define PF_OWN __attribute__((weak, visibility("hidden")))

// glibc 2.32: whether a process has but one thread. No: as if it were never known.
extern "C" {
PF_OWN char __libc_single_threaded = 0;
}

// libstdc++ 3.4.29.
namespace std {
PF_OWN void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
