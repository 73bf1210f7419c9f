// See about.h.
#include "about.h"

#include <exception>
#include <string>

#include "core/isa.h"
#include "core/roofs.h"
#include "cpu/cores.h"

namespace {

// A message outlives the call that made it, until the thread's next one.
const char* kept(const std::exception& error) {
  static thread_local std::string message;
  message = error.what();
  return message.c_str();
}

}  // namespace

const char* perceiver_fast_active_isa(const char** error) noexcept {
  try {
    return perceiver_fast::isa_name(perceiver_fast::active_isa());
  } catch (const std::exception& raised) {
    *error = kept(raised);
    return nullptr;
  }
}

const char* perceiver_fast_available_isas() noexcept {
  static const std::string names = [] {
    std::string names;
    for (const auto isa : perceiver_fast::available_isas())
      names += std::string(names.empty() ? "" : " ") + perceiver_fast::isa_name(isa);
    return names;
  }();
  return names.c_str();
}

const char* perceiver_fast_roofs(int threads, double* rates) noexcept {
  try {
    const perceiver_fast::Roofs roofs = perceiver_fast::measure_roofs(perceiver_fast::active_isa(), threads);
    rates[0] = roofs.multiply_adds;
    rates[1] = roofs.exponentials;
    rates[2] = roofs.copied_bytes;
    return nullptr;
  } catch (const std::exception& raised) {
    return kept(raised);
  }
}

int perceiver_fast_team_cores() noexcept {
  try {
    return perceiver_fast::team_cores();
  } catch (const std::exception&) {
    return 0;
  }
}
