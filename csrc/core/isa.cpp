// Which instruction set runs: what the CPU says it has, and what PERCEIVER_FAST_CPU_ISA asks for.
#include "isa.h"

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

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace perceiver_fast
