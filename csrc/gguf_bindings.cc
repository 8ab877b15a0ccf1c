// GGUF_TYPES: the rows of formats/gguf/gguf_types.cc in words; and rows of a file decoded.
#include "gguf_bindings.h"

#include <stdexcept>
#include <string>

#include "core/cpu_features.h"
#include "formats/gguf/gguf_types.h"
#include "kernels/gguf_rows.h"
#include "unlocked.h"

namespace py = pybind11;

namespace {

py::dict row(const kt::GgufType& type) {
  py::dict d;
  d["name"] = type.name;
  d["id"] = type.id;
  d["columns"] = type.columns;
  d["bytes"] = type.bytes;
  d["group"] = type.group == 0 ? py::object(py::none()) : py::int_(type.group);
  d["lows"] = type.lows;
  d["repacked"] = type.parts != nullptr;
  return d;
}

kt::DType dtype_named(const std::string& name) {
  if (name == "F32") return kt::DType::kF32;
  if (name == "BF16") return kt::DType::kBf16;
  if (name == "F16") return kt::DType::kF16;
  throw std::invalid_argument("numbers of dtype " + name + " were asked for; expected F32, BF16 or F16");
}

void gguf_decode(int type, uintptr_t source, int64_t rows, int64_t columns, uintptr_t target,
                 const std::string& dtype) {
  if (!kt::cpu_features().active.has(kt::Feature::kAvx2)) throw std::runtime_error("decoding GGUF needs AVX2");
  const kt::GgufType& known = kt::gguf_type(type);
  if (rows < 0 || columns < 0 || columns % known.columns != 0) {
    throw std::invalid_argument(std::to_string(rows) + " rows of " + std::to_string(columns) +
                                " columns are no blocks of " + known.name + "; expected a multiple of " +
                                std::to_string(known.columns) + " columns");
  }
  kt::decode_gguf_rows_avx2({type, reinterpret_cast<const uint8_t*>(source), rows, columns},
                            reinterpret_cast<void*>(target), dtype_named(dtype));
}

}  // namespace

void bind_gguf(py::module_& m) {
  py::list rows;
  for (const kt::GgufType& type : kt::gguf_types()) rows.append(row(type));
  m.attr("GGUF_TYPES") = py::tuple(rows);
  m.def(
      "gguf_decode", &gguf_decode, py::arg("type"), py::arg("source"), py::arg("rows"), py::arg("columns"),
      py::arg("target"), py::arg("dtype"), py::call_guard<kt::Unlocked>(),
      "Decode the blocks of contiguous rows [rows, columns] at an address to numbers at another, row-major, on the\n"
      "calling thread.\n\n"
      "`type`: ggml's number; `dtype`: F32, BF16 or F16 (rounded to nearest even). The sizes of both memories are the\n"
      "caller's. Raises ValueError for a type that is not in GGUF_TYPES and columns that are not whole blocks.");
}
