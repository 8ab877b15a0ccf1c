#include "formats/panel.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "formats/codes/code_kind.h"
#include "formats/gguf/gguf_types.h"
#include "formats/gguf_blocks.h"
#include "formats/gguf_panel.h"
#include "formats/numbers.h"
#include "formats/panel_scales.h"

namespace kt {
namespace {

[[noreturn]] void fail(const Format& format, const std::string& what) {
  throw std::invalid_argument(std::string(format.name) + ": " + what);
}

std::string text(int value) { return std::to_string(value); }
std::string text(MatrixShape shape) { return "[" + text(shape.rows) + ", " + text(shape.k) + "]"; }

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

ScaleType stored_scale(const Format& format, const FormatOptions& options) {
  if (format.rows_per_scale == 0 || format.scale != ScaleType::kNone) return format.scale;
  return as_scale_type(options.scale_dtype);
}

// Columns per scale as the checkpoint says; checks that they fit the matrix.
int group_columns(const Format& format, MatrixShape shape, const FormatOptions& options, int k_padded) {
  if (format.columns_per_scale == kWholeRow) return k_padded;
  if (format.columns_per_scale != kGroupOption) {
    // Blocks of several rows may be ragged, groups of a single row may not.
    if (format.rows_per_scale == 1 && shape.k % format.columns_per_scale != 0) {
      fail(format, "a matrix " + text(shape) + " does not divide into groups of " + text(format.columns_per_scale) +
                       " columns");
    }
    return format.columns_per_scale;
  }
  const int group = options.group_size;
  if (group == 0 || group == shape.k) return k_padded;
  if (group < 0 || group % kSmallestStepK != 0 || shape.k % group != 0) {
    fail(format, "group size " + text(group) + " does not fit a matrix " + text(shape) +
                     "; expected a multiple of 16 that divides " + text(shape.k) + ", or 0 for one scale per row");
  }
  return group;
}

// Rows are whole bytes, and columns of a transposed matrix whole words of 32 bits.
void check_packing(const Format& format, MatrixShape shape) {
  if (format.blocks != nullptr) {
    if (shape.k % format.blocks->columns == 0) return;
    fail(format,
         "a matrix " + text(shape) + " does not divide into blocks of " + text(format.blocks->columns) + " columns");
  }
  const int bits = code_kind(format.codes).bits;
  const int columns = std::max(1, (format.order == Order::kTransposed ? 32 : 8) / bits);
  if (shape.k % columns == 0) return;
  fail(format, "a matrix " + text(shape) + " cannot hold packed " + text(bits) + "-bit codes; expected " +
                   (columns == 2 ? "an even number" : "a multiple of " + text(columns)) + " of columns");
}

// The largest power of two up to kLargestStepK that divides the group; a single group is cut into the largest.
int step_columns(int group_k, int k_padded) {
  int step = kLargestStepK;
  while (group_k < k_padded && group_k % step != 0) step /= 2;
  return step;
}

// The table's values as integers; returns the largest magnitude. kCode4Wide keeps their signs, others an offset.
int set_table(const Format& format, PanelLayout& layout) {
  float values[16];
  std::transform(format.table->bf16, format.table->bf16 + 16, values, from_bf16);
  const bool whole = std::all_of(values, values + 16, [](float v) { return v == std::floor(v); });
  layout.integer_factor = whole ? 1 : 0.5f;
  const float least = *std::min_element(values, values + 16);
  layout.integer_offset = format.codes == CodeType::kCode4Wide ? 0 : static_cast<int>(-least / layout.integer_factor);
  int largest = 0;
  for (int code = 0; code < 16; ++code) {
    const int integer = static_cast<int>(values[code] / layout.integer_factor);
    layout.integers[code] = static_cast<uint8_t>(integer + layout.integer_offset);
    largest = std::max(largest, std::abs(integer));
  }
  return largest;
}

// What kernels for int8 activations need to know.
void set_integers(const Format& format, PanelLayout& layout) {
  const int bits = code_kind(format.codes).bits;
  int largest = 0;
  layout.integer_factor = 1;
  // Codes of 5 bits are centred even where the format does not, so that sums of 32 columns fit 16 bits.
  layout.integer_offset = format.codes == CodeType::kCode5 ? 16 : format.code_offset;
  if (format.table != nullptr) {
    largest = set_table(format, layout);
  } else if (bits < 8) {
    largest = std::max(layout.integer_offset, (1 << bits) - 1 - layout.integer_offset);
  }
  layout.int8_step_k = kLargestInt8StepK;
  layout.int8_sum_k = std::min(layout.step_k, kLargestInt8StepK);
  if (bits == 8 || format.codes == CodeType::kCode4Wide) {
    layout.integer_offset = kSignedOffset;
    return;
  }
  // AVX2 sums the products of every second pair of columns in 16 bits.
  while (largest * 127 * layout.int8_sum_k / 2 > INT16_MAX) layout.int8_sum_k /= 2;
}

void pack_codes(const Format& format, const PanelLayout& layout, const CodeSource& source, uint8_t* panel) {
  if (source.rows < kPanelRows || source.shape.k < layout.k_padded) {
    std::memset(panel, format.table != nullptr ? 0x11 * format.table->zero_code : 0, layout.header_offset);
  }
  const uint32_t nan_rows = code_kind(format.codes).pack(format, source, panel);
  if (layout.scale_type == ScaleType::kNone) return;
  PanelHeader header{};
  header.nan_rows = nan_rows;
  std::memset(panel + layout.header_offset, 0, kPanelHeaderBytes);
  std::memcpy(panel + layout.header_offset, &header, sizeof(header));
}

void unpack_codes(const Format& format, const uint8_t* panel, int index, const MatrixPart& part,
                  const MatrixTarget& target) {
  const int first = index * kPanelRows;
  const int begin = std::max(0, part.row - first);
  const PanelRows rows = {begin, std::min(kPanelRows, part.row + part.rows - first), first + begin - part.row};
  if (rows.begin < rows.end) code_kind(format.codes).unpack(format, panel, rows, part, target);
}

}  // namespace

PanelLayout panel_layout(const Format& format, MatrixShape shape, const FormatOptions& options) {
  if (format.codes == CodeType::kBlocks) return block_layout(format, shape);
  check_packing(format, shape);
  PanelLayout layout{};
  layout.k_padded = static_cast<int>(round_up(shape.k, kPanelK));
  layout.bytes_per_32k = size_t{kPanelRows} * 32 * code_kind(format.codes).bits / 8;
  layout.header_offset = layout.k_padded / 32 * layout.bytes_per_32k;
  layout.scale_type = stored_scale(format, options);
  layout.group_k = layout.record_k = layout.k_padded;
  layout.step_k = kLargestStepK;
  size_t scales = 0;
  if (layout.scale_type != ScaleType::kNone) {
    layout.group_k = group_columns(format, shape, options, layout.k_padded);
    layout.step_k = step_columns(layout.group_k, layout.k_padded);
    layout.record_k = record_columns(layout.scale_type, layout.group_k);
    layout.scale_stride = record_bytes(layout.scale_type, layout.record_k / layout.group_k);
    const int records = (layout.k_padded + layout.record_k - 1) / layout.record_k;
    scales = kPanelHeaderBytes + records * layout.scale_stride;
  }
  layout.panel_bytes = layout.header_offset + round_up(scales, 64);
  if (format.table != nullptr) std::copy_n(format.table->bf16, 16, layout.table);
  set_integers(format, layout);
  return layout;
}

void pack_panel(const Format& format, const PanelLayout& layout, const FormatOptions& options,
                const MatrixSource& source, MatrixShape shape, int index, uint8_t* panel) {
  if (format.codes == CodeType::kBlocks) return pack_blocks(layout, source, shape, index, panel);
  if (format.blocks != nullptr) return pack_gguf_panel(format, layout, source, shape, index, panel);
  const int rows = std::clamp(shape.rows - index * kPanelRows, 0, kPanelRows);
  pack_codes(format, layout, {source.codes, shape, index, rows}, panel);
  pack_scales(format, layout, options, source, shape, index, panel);
}

double element(const Format& format, const PanelLayout& layout, const uint8_t* panel, int row, int column) {
  if (format.codes == CodeType::kBlocks) return block_element(format, layout, panel, row, column);
  if (format.blocks != nullptr) return gguf_element(format, layout, panel, row, column);
  return code_kind(format.codes).value(format, panel, row, column) * scale_value(layout, panel, row, column);
}

void check_split(const Format& format, const PanelLayout& layout, MatrixShape shape, int row_parts, int column_parts) {
  const auto check = [&](const char* name, int whole, int parts, int block, const char* block_name) {
    const int part = whole / parts;
    if (whole % parts != 0) {
      fail(format, text(whole) + " " + name + " do not divide into " + text(parts) + " equal parts");
    }
    if (parts > 1 && part % block != 0 && block % part != 0) {
      fail(format, "parts of " + text(part) + " " + name + " (a " + text(parts) + "-way split) would cut " +
                       block_name + " of " + text(block));
    }
  };
  const int word = format.columns_per_word;
  check("rows", shape.rows, row_parts, format.rows_per_scale > 0 ? std::min(format.rows_per_scale, shape.rows) : 1,
        "scale blocks");
  check("columns", shape.k, column_parts, format.rows_per_scale > 0 ? std::min(layout.group_k, shape.k) : 1,
        "scale groups");
  if (column_parts > 1 && shape.k / column_parts % word != 0) {
    fail(format, "parts of " + text(shape.k / column_parts) + " columns (a " + text(column_parts) +
                     "-way split) would cut words of " + text(word) + " codes");
  }
}

void unpack_panel(const Format& format, const PanelLayout& layout, const uint8_t* panel, int index,
                  const MatrixPart& part, const MatrixTarget& target) {
  if (format.codes == CodeType::kBlocks) return unpack_blocks(format, layout, panel, index, part, target);
  if (format.blocks != nullptr) return unpack_gguf_panel(format, layout, panel, index, part, target);
  unpack_codes(format, panel, index, part, target);
  unpack_scales(format, layout, panel, index, part, target);
}

size_t written_code_bytes(const Format& format, const MatrixPart& part) {
  if (format.blocks != nullptr) return sizeof(uint16_t) * part.rows * part.columns;  // bf16
  return part.rows * row_bytes(format, part.columns);
}

size_t written_scale_bytes(const Format& format, const PanelLayout& layout, const MatrixPart& part) {
  if (layout.scale_type == ScaleType::kNone || format.blocks != nullptr) return 0;
  const ScaleType type = format.written_scale == ScaleType::kNone ? layout.scale_type : format.written_scale;
  const size_t rows = (part.rows + format.rows_per_scale - 1) / format.rows_per_scale;
  return rows * ((part.columns + layout.group_k - 1) / layout.group_k) * scale_bytes(type);
}

}  // namespace kt
