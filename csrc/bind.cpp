// What Python asks of the library that needs no tensor. No torch headers here.
//
// With US3L_ABI3=1 the library must run with every Python >= 3.10, which pybind11 cannot: then the module is empty,
// and loading it registers the operations all the same.

#if defined(Py_LIMITED_API)

#include <Python.h>

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }

#else

#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native operations of us3l_kernels (torch.ops.us3l_native) and what they were built with.";
  m.def("isa", [] { return us3l::isa_name(us3l::isa()); }, "The instruction set the CPU kernels run with.");
  m.def(
      "cpu_features",
      [] {
        py::dict features;
        for (const auto& [name, present] : us3l::cpu_features()) features[py::str(name)] = present;
        return features;
      },
      "What this CPU has of what the kernels can use.");
  m.def(
      "build_info",
      [] {
        return py::dict("compiler"_a = US3L_COMPILER, "flags"_a = US3L_FLAGS, "torch"_a = US3L_TORCH,
                        "cuda"_a = US3L_CUDA_TOOLKIT);
      },
      "What this library was built with.");
}

#endif
