// The Python module perceiver_fast._C: importing it loads libperceiver_fast.so, and with it the torch operators of
// csrc/cpu; what it exports itself says how they were built and what they run on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "about.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of perceiver_fast and how they were built.";
  m.def("active_isa", [] {
    const char* error = nullptr;
    const char* isa = perceiver_fast_active_isa(&error);
    if (isa == nullptr) throw std::runtime_error(error);
    return std::string(isa);
  }, "Instruction set the kernels run on. Raises RuntimeError when PERCEIVER_FAST_CPU_ISA asks for one that cannot run.");
  m.def("available_isas", [] {
    std::istringstream words(perceiver_fast_available_isas());
    std::vector<std::string> names;
    for (std::string name; words >> name;) names.push_back(name);
    return names;
  }, "Instruction sets compiled in and supported by this CPU, slowest first.");
  m.def("roofs", [](int threads) {
    std::array<double, 3> rates{};
    const char* error;
    {
      const py::gil_scoped_release release;
      error = perceiver_fast_roofs(threads, rates.data());
    }
    if (error != nullptr) throw std::invalid_argument(error);
    return std::make_tuple(rates[0], rates[1], rates[2]);
  }, "Multiply-adds, exponentials and copied bytes a second that `threads` threads reach together; half a second.");
  m.def("team_cores", &perceiver_fast_team_cores,
        "How many of the threads that torch runs this thread's work on can run at once: fewer where they share processors.");
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["torch_headers"] = PF_TORCH_VERSION;
    info["stable_abi_target"] = PF_TORCH_TARGET;
    return info;
  }, "Compiler, torch headers and oldest torch the extension runs on.");
}
