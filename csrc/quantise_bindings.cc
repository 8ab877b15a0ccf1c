#include "quantise_bindings.h"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/cpu_features.h"
#include "kernels/quantise.h"
#include "unlocked.h"

namespace py = pybind11;

namespace {

// (address of fp32 scales, first row, rows of a block, columns of a block)
using Blocks = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

kt::NumberType number_type(const std::string& dtype) {
  if (dtype == "BF16") return kt::NumberType::kBf16;
  if (dtype == "F16") return kt::NumberType::kF16;
  if (dtype == "F32") return kt::NumberType::kF32;
  if (dtype == "F8_E4M3") return kt::NumberType::kE4m3;
  throw std::invalid_argument("numbers of dtype " + dtype + " cannot be quantised; expected BF16, F16, F32 or F8_E4M3");
}

kt::IntegerCodes integer_codes(int bits) {
  if (bits == 8) return kt::IntegerCodes::kInt8;
  if (bits == 4) return kt::IntegerCodes::kInt4;
  throw std::invalid_argument("codes of " + std::to_string(bits) + " bits were asked for; expected 4 or 8");
}

void check(const kt::QuantiseArgs& args) {
  const bool whole_rows = args.group == args.columns;
  const bool even = args.codes == kt::IntegerCodes::kInt8 || args.columns % 2 == 0;
  const bool blocks_fit =
      args.blocks.scales == nullptr || args.blocks.block_columns % 8 == 0 || args.blocks.block_columns >= args.columns;
  if (args.rows < 0 || args.columns < 1 || args.group < 1 || args.columns % args.group != 0 ||
      (!whole_rows && args.group % kt::kQuantiseStep != 0) || !even || !blocks_fit) {
    throw std::invalid_argument(std::to_string(args.rows) + " rows of " + std::to_string(args.columns) +
                                " columns in groups of " + std::to_string(args.group) +
                                " cannot be quantised; expected an even number of columns for 4 bits, and groups that "
                                "divide them and are whole rows or multiples of 32");
  }
}

// See kernels/quantise.h; the shapes are checked here, the addresses are the caller's.
int64_t quantise_rows(const std::string& dtype, uintptr_t numbers, int64_t rows, int64_t columns,
                      const std::optional<Blocks>& blocks, int bits, int64_t group, uintptr_t codes,
                      uintptr_t code_scales) {
  if (!kt::cpu_features().active.has(kt::Feature::kAvx2)) throw std::runtime_error("quantising needs AVX2");
  const kt::Unlocked release;
  kt::QuantiseArgs args{};
  args.type = number_type(dtype);
  args.numbers = reinterpret_cast<const uint8_t*>(numbers);
  const int64_t bytes = args.type == kt::NumberType::kF32 ? 4 : args.type == kt::NumberType::kE4m3 ? 1 : 2;
  args.row_bytes = static_cast<size_t>(columns * bytes);
  args.rows = rows;
  args.columns = columns;
  args.group = group;
  if (blocks) {
    const auto& [scales, first_row, block_rows, block_columns] = *blocks;
    args.blocks = {reinterpret_cast<const float*>(scales), first_row, block_rows, block_columns,
                   (columns + block_columns - 1) / block_columns};
  }
  args.codes = integer_codes(bits);
  args.code_bytes = reinterpret_cast<uint8_t*>(codes);
  args.code_scales = reinterpret_cast<float*>(code_scales);
  check(args);
  std::vector<float> row(
      static_cast<size_t>((columns + kt::kQuantiseStep - 1) / kt::kQuantiseStep * kt::kQuantiseStep));
  args.row = row.data();
  return kt::quantise_rows_avx2(args);
}

}  // namespace

void bind_quantise(py::module_& m) {
  m.def("quantise_rows", &quantise_rows, py::arg("dtype"), py::arg("numbers"), py::arg("rows"), py::arg("columns"),
        py::arg("blocks"), py::arg("bits"), py::arg("group"), py::arg("codes"), py::arg("code_scales"),
        "Quantise contiguous rows [rows, columns] at an address to codes of 8 or 4 bits and one float32 scale per\n"
        "`group` columns (kernels/quantise.h), without holding the interpreter lock.\n\n"
        "`dtype`: BF16, F16, F32 or F8_E4M3; `blocks`: (address of float32 scales, first row, rows and columns of a\n"
        "block), for float8. Returns the first row that holds an infinite or NaN number, or -1. Raises ValueError.");
}
