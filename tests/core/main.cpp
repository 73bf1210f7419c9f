// core_tests isas: the instruction sets that this build and this CPU can run.
// core_tests GROUP: runs a group of cases on the one that PERCEIVER_FAST_CPU_ISA names, and exits with 1 if any fails.
#include <string>

#include "../../csrc/core/isa.h"
#include "check.h"

using perceiver_fast::Isa;

int failures = 0;

#define GROUPS_OF(isa)                                                 \
  namespace isa {                                                      \
  extern const Case vectors_cases[], functions_cases[], tiles_cases[]; \
  const Case* group(const std::string& name) {                         \
    if (name == "vectors") return vectors_cases;                       \
    if (name == "functions") return functions_cases;                   \
    return name == "tiles" ? tiles_cases : nullptr;                    \
  }                                                                    \
  }

namespace perceiver_fast {
GROUPS_OF(baseline)
#if defined(__x86_64__)
GROUPS_OF(avx2)
GROUPS_OF(avx512)
#endif
}  // namespace perceiver_fast

extern const Case rows_cases[], attention_cases[], regions_cases[];

static const Case* group(const std::string& name) {
  if (name == "rows") return rows_cases;
  if (name == "attention") return attention_cases;
  if (name == "regions") return regions_cases;
#if defined(__x86_64__)
  if (perceiver_fast::active_isa() == Isa::avx512) return perceiver_fast::avx512::group(name);
  if (perceiver_fast::active_isa() == Isa::avx2) return perceiver_fast::avx2::group(name);
#endif
  return perceiver_fast::baseline::group(name);
}

int main(int count, char** arguments) {
  const std::string wish = count == 2 ? arguments[1] : "";
  if (wish == "isas") {
    for (Isa isa : perceiver_fast::available_isas()) printf("%s\n", isa_name(isa));
    return 0;
  }
  const Case* cases = group(wish);
  if (cases == nullptr) {
    printf("expected isas or a group of cases, got '%s'\n", wish.c_str());
    return 2;
  }
  for (; cases->name != nullptr; ++cases) {
    printf("%s\n", cases->name);
    fflush(stdout);  // before a crash
    cases->run();
  }
  return failures == 0 ? 0 : 1;
}
