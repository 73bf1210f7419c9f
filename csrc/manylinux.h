// Included before every source of a wheel for many Linux releases (PERCEIVER_FAST_MANYLINUX): what new releases of glibc
// and libstdc++ have is taken in its old form, or is here.
#pragma once

#include <bits/c++config.h>

// Templates of libstdc++ that the oldest release has not are compiled in.
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0

#include <dlfcn.h>

#include <exception>
#include <new>

// glibc 2.29 has these anew, without setting errno, and 2.34 the last two in another library; the old ones do the same.
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
PF_OLD(dlopen);
PF_OLD(dlsym);

#define PF_OWN __attribute__((weak, visibility("hidden")))

// glibc 2.32: whether a process has but one thread. No: as if it were never known.
extern "C" {
PF_OWN char __libc_single_threaded = 0;
}

// libstdc++ 3.4.29.
namespace std {
PF_OWN void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// CXXABI 1.3.13: the two steps of copying and of destroying a pointer to an exception, which have been one function each
// before, and still are. (pybind11 copies such pointers.) Those functions call these steps by their names in turn, so nobody
// else may find ours: they are hidden, by the assembler, since libstdc++ declares them visible.
__asm__(".hidden _ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
__asm__(".hidden _ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
namespace __exception_ptr {
template <class Function>
Function* in_libstdcxx(const char* name) {
  return reinterpret_cast<Function*>(dlsym(dlopen("libstdc++.so.6", RTLD_LAZY | RTLD_NOLOAD), name));
}
__attribute__((weak)) void exception_ptr::_M_addref() noexcept {
  static const auto copy = in_libstdcxx<void(void*, const void*)>("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
  void* one_more;  // it counts, and is never destroyed
  copy(&one_more, this);
}
__attribute__((weak)) void exception_ptr::_M_release() noexcept {
  static const auto destroy = in_libstdcxx<void(void*)>("_ZNSt15__exception_ptr13exception_ptrD1Ev");
  destroy(this);
}
}  // namespace __exception_ptr
}  // namespace std
