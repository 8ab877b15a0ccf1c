#include "formats/gguf_blocks.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "formats/numbers.h"

namespace kt {
namespace {

// The numbers of columns [column, +count) of a row, decoded some whole blocks at a time, as use(numbers, count).
template <class Use>
void decode(const GgufType& type, const uint8_t* row, int column, int count, Use use) {
  float numbers[kLargestBlock];
  const int end = column + count;
  const int step = kLargestBlock / type.columns * type.columns;
  for (int first = column / type.columns * type.columns; first < end; first += step) {
    const int blocks = (std::min(end - first, step) + type.columns - 1) / type.columns;
    type.numbers(row + type.row_bytes(first), blocks * type.columns, numbers);
    const int skipped = std::max(0, column - first);
    use(numbers + skipped, std::min(step, end - first) - skipped);
  }
}

}  // namespace

const std::vector<Format>& block_formats() {
  static const std::vector<Format> formats = [] {
    std::vector<Format> rows;
    for (const GgufType& type : gguf_types()) {
      Format format = {type.name, CodeType::kBlocks, nullptr,          Order::kRowMajor, 1,
                       0,         kWholeRow,         ScaleType::kNone, ScaleType::kNone};
      format.blocks = &type;
      format.shared_method = "LLAMAFILE";
      rows.push_back(format);
    }
    return rows;
  }();
  return formats;
}

const Format& block_format(const GgufType& type) { return block_formats()[&type - gguf_types().data()]; }

PanelLayout block_layout(const Format& format, MatrixShape shape) {
  const GgufType& type = *format.blocks;
  if (shape.k % type.columns != 0) {
    throw std::invalid_argument(std::string(format.name) + ": a matrix [" + std::to_string(shape.rows) + ", " +
                                std::to_string(shape.k) + "] does not divide into blocks of " +
                                std::to_string(type.columns) + " columns");
  }
  PanelLayout layout{};
  layout.k_padded = (shape.k + kPanelK - 1) / kPanelK * kPanelK;
  layout.group_k = layout.record_k = layout.k_padded;
  layout.step_k = kLargestStepK;
  layout.block_type = type.id;
  layout.block_k = type.columns;
  layout.block_bytes = type.bytes;
  layout.block_row_bytes = type.row_bytes(shape.k);
  layout.k = shape.k;
  layout.panel_bytes = layout.header_offset = kPanelRows * layout.block_row_bytes;
  return layout;
}

void pack_blocks(const PanelLayout& layout, const MatrixSource& source, MatrixShape shape, int index, uint8_t* panel) {
  const size_t rows = static_cast<size_t>(std::clamp(shape.rows - index * kPanelRows, 0, kPanelRows));
  const size_t bytes = rows * layout.block_row_bytes;
  std::memcpy(panel, source.codes + index * layout.panel_bytes, bytes);
  std::memset(panel + bytes, 0, layout.panel_bytes - bytes);
}

void unpack_blocks(const Format& format, const PanelLayout& layout, const uint8_t* panel, int index,
                   const MatrixPart& part, const MatrixTarget& target) {
  const int first = index * kPanelRows;
  const int begin = std::max(0, part.row - first);
  const int end = std::min(kPanelRows, part.row + part.rows - first);
  for (int r = begin; r < end; ++r) {
    uint8_t* out = target.codes + static_cast<size_t>(first + r - part.row) * part.columns * sizeof(uint16_t);
    decode(*format.blocks, panel + r * layout.block_row_bytes, part.column, part.columns,
           [&](const float* numbers, int count) {
             for (int i = 0; i < count; ++i, out += sizeof(uint16_t)) {
               const uint16_t bits = to_bf16(numbers[i]);
               std::memcpy(out, &bits, sizeof(bits));
             }
           });
  }
}

double block_element(const Format& format, const PanelLayout& layout, const uint8_t* panel, int row, int column) {
  if (column >= layout.k) return 0;
  double value = 0;
  decode(*format.blocks, panel + row * layout.block_row_bytes, column, 1,
         [&](const float* numbers, int) { value = numbers[0]; });
  return value;
}

}  // namespace kt
