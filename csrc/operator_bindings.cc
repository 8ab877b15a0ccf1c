// Operators, linear layers and recordings of decode steps, for kt_kernel/operators.
#include "operator_bindings.h"

#include <pybind11/stl.h>

#include <memory>

#include "linear/linear.h"
#include "operators/handles.h"
#include "operators/registry.h"
#include "unlocked.h"

namespace py = pybind11;

namespace {

using kt::Engine;
using kt::Linear;
using kt::Recording;

// (method, format, rows, address of the codes, of the scales, factor, group size, dtype of the scales)
using Part = std::tuple<std::string, std::string, int, uintptr_t, uintptr_t, float, int, int>;

std::shared_ptr<Linear> make_linear(std::shared_ptr<Engine> engine, int k, const std::vector<Part>& given,
                                    const std::string& activations) {
  std::vector<kt::LinearPart> parts;
  for (const auto& [method, format, rows, codes, scales, factor, group_size, scale_dtype] : given) {
    parts.push_back({&kt::format_of(method, format),
                     {group_size, static_cast<kt::DType>(scale_dtype)},
                     rows,
                     {reinterpret_cast<const uint8_t*>(codes), reinterpret_cast<const uint8_t*>(scales), factor}});
  }
  engine->require_own_process();
  kt::Unlocked release;
  return std::make_shared<Linear>(std::move(engine), k, parts, kt::activations_named(activations));
}

void bind_linear(py::module_& m) {
  py::class_<Linear, std::shared_ptr<Linear>>(m, "Linear")
      .def(py::init(&make_linear), py::arg("engine"), py::kw_only(), py::arg("k"), py::arg("parts"),
           py::arg("activations") = "auto")
      .def_property_readonly("handle", [](const std::shared_ptr<Linear>& l) { return kt::Handles<Linear>::of(l); })
      .def_property_readonly("rows", &Linear::rows)
      .def_property_readonly("k", &Linear::k)
      .def_property_readonly("weight_bytes", &Linear::bytes)
      .def_property_readonly("kernels", &Linear::kernels);
}

void bind_recording(py::module_& m) {
  py::class_<Recording>(m, "Recording")
      .def(py::init<>())
      .def("open", &Recording::open)
      .def("close", &Recording::close)
      .def_property_readonly("size", &Recording::size)
      .def(
          "replay", [](const Recording& r, size_t begin, size_t end) { r.replay(kt::operator_engine(), begin, end); },
          py::arg("begin"), py::arg("end"), py::call_guard<kt::Unlocked>());
}

}  // namespace

void bind_operators(py::module_& m) {
  m.def("register_operators", &kt::register_operators);
  m.def("use_operator_engine", &kt::use_engine, py::arg("engine"));
  m.def("operator_schemas", &kt::operator_schemas);
  m.def("linear_rows", [](int64_t handle) { return kt::Handles<Linear>::find(handle)->rows(); }, py::arg("handle"));
  bind_linear(m);
  bind_recording(m);
}
