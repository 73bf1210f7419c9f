// The Python module perceiver_fast._C: importing it loads libperceiver_fast.so, and with it the torch operators of
// csrc/cpu; what it exports itself says how they were built and what they run on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/isa.h"
#include "core/roofs.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of perceiver_fast and how they were built.";
  m.def("active_isa", [] { return perceiver_fast::isa_name(perceiver_fast::active_isa()); },
        "Instruction set the kernels run on. Raises RuntimeError when PERCEIVER_FAST_CPU_ISA asks for one that cannot run.");
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (auto isa : perceiver_fast::available_isas()) names.push_back(perceiver_fast::isa_name(isa));
    return names;
  }, "Instruction sets compiled in and supported by this CPU, slowest first.");
  m.def("roofs", [](int threads) {
    const perceiver_fast::Isa isa = perceiver_fast::active_isa();
    py::gil_scoped_release release;
    const perceiver_fast::Roofs roofs = perceiver_fast::measure_roofs(isa, threads);
    return std::make_tuple(roofs.multiply_adds, roofs.exponentials, roofs.copied_bytes);
  }, "Multiply-adds, exponentials and copied bytes a second that `threads` threads reach together; half a second.");
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["torch_headers"] = PF_TORCH_VERSION;
    info["stable_abi_target"] = PF_TORCH_TARGET;
    return info;
  }, "Compiler, torch headers and oldest torch the extension runs on.");
}
