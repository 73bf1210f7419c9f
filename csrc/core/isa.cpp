// Which instruction set runs: what the CPU says it has, and what PERCEIVER_FAST_CPU_ISA asks for.
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>

namespace perceiver_fast {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas{Isa::baseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isas.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      isas.push_back(Isa::avx512);
  }
#endif
  return isas;
}

namespace {

Isa choose() {
  const auto isas = available_isas();
  const char* wish = std::getenv("PERCEIVER_FAST_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return isas.back();
  std::string names;
  for (Isa isa : isas) {
    if (wish == std::string(isa_name(isa))) return isa;
    names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::runtime_error(std::string("PERCEIVER_FAST_CPU_ISA: expected one of ") + names +
                           " (what this build and this CPU can run), got '" + wish +
                           "'; unset it to let the best one be chosen.");
}

// What the CPU says; compilers know the names of these features only since GCC 11.
bool has_bfloat16_pairs() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool amx_bf16 = d >> 22 & 1;
  return !amx_bf16 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
#else
  return false;
#endif
}

}  // namespace

bool multiplies_bfloat16_pairs() {
  static const bool pairs = active_isa() == Isa::avx512 && has_bfloat16_pairs();
  return pairs;
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace perceiver_fast
