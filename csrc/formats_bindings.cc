// FORMATS: the rows of formats/format.cc in words, for who compares them with the records of methods in Python; and
// files of the original converter.
#include "formats_bindings.h"

#include "formats/codes/code_kind.h"
#include "formats/numa_parts.h"
#include "formats/numbers.h"
#include "unlocked.h"

namespace py = pybind11;

namespace {

const char* word(kt::Order order) { return order == kt::Order::kTransposed ? "transposed" : "row major"; }

py::object word(kt::ScaleType type, const char* otherwise) {
  static const char* const words[] = {nullptr,
                                      "scalar",
                                      "float32",
                                      "bfloat16",
                                      "float16",
                                      "e8m0",
                                      "e4m3",
                                      "float16 with minimum",
                                      "two levels",
                                      "two levels with minimum",
                                      "two levels of 4 bits with minimum"};
  return py::str(type == kt::ScaleType::kNone ? otherwise : words[static_cast<int>(type)]);
}

py::object columns_per_scale(const kt::Format& format) {
  if (format.columns_per_scale == kt::kWholeRow) return py::str("row");
  if (format.columns_per_scale == kt::kGroupOption) return py::str("group size");
  return py::int_(format.columns_per_scale);
}

// The numbers of codes that look up a table.
py::object table(const kt::Format& format) {
  if (format.table == nullptr) return py::none();
  py::tuple values(std::size(format.table->bf16));
  for (size_t i = 0; i < values.size(); ++i) values[i] = py::float_(kt::from_bf16(format.table->bf16[i]));
  return values;
}

py::dict row(const kt::Format& format) {
  const kt::CodeKind& codes = kt::code_kind(format.codes);
  const bool scaled = format.rows_per_scale > 0;
  py::dict d;
  d["name"] = format.name;
  d["method"] = format.method();
  d["codes"] = codes.name;
  d["bits"] = codes.bits;
  d["table"] = table(format);
  d["order"] = word(format.order);
  d["columns_per_word"] = format.columns_per_word;
  d["rows_per_scale"] = scaled ? py::object(py::int_(format.rows_per_scale)) : py::none();
  d["columns_per_scale"] = scaled ? columns_per_scale(format) : py::none();
  d["scale"] = scaled ? word(format.scale, "as stored") : py::none();
  d["written_scale"] = scaled ? word(format.written_scale, "as kept") : py::none();
  return d;
}

using UnpackPart = void (*)(const kt::NumaPart&, uint8_t*, size_t);

template <UnpackPart unpack>
void unpack_part(uintptr_t packed, int rows, int columns, uintptr_t out, size_t row_bytes) {
  unpack({reinterpret_cast<const uint8_t*>(packed), rows, columns}, reinterpret_cast<uint8_t*>(out), row_bytes);
}

void bind_unpack_part(py::module_& m, const char* name, void (*unpack)(uintptr_t, int, int, uintptr_t, size_t)) {
  m.def(name, unpack, py::arg("packed"), py::arg("rows"), py::arg("columns"), py::arg("out"), py::arg("row_bytes"),
        py::call_guard<kt::Unlocked>(),
        "One part of an original converter's matrix into rows (formats/numa_parts.h); sizes are the caller's.");
}

}  // namespace

void bind_formats(py::module_& m) {
  py::list rows;
  for (const kt::Format* format : kt::all_formats()) rows.append(row(*format));
  m.attr("FORMATS") = py::tuple(rows);
  bind_unpack_part(m, "unpack_numa_part_int8", &unpack_part<&kt::unpack_numa_part_int8>);
  bind_unpack_part(m, "unpack_numa_part_int4", &unpack_part<&kt::unpack_numa_part_int4>);
}
