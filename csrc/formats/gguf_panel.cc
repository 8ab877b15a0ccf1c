#include "formats/gguf_panel.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "formats/codes/code_kind.h"
#include "formats/gguf/gguf_types.h"
#include "formats/numbers.h"

namespace kt {
namespace {

constexpr int kBlockColumns = 256;  // worked on at a time: with 32 rows no more than 9 KiB of a panel

constexpr uint16_t kE8m0Nan = 255;

// Where a record's two-level scales stand.
constexpr size_t kHalves = kPanelRows * sizeof(uint16_t);
constexpr size_t kBytes = kPanelRows;

void write_half(uint8_t* halves, int row, uint16_t bits) {
  std::memcpy(halves + row * sizeof(bits), &bits, sizeof(bits));
}
float read_half(const uint8_t* halves, int row) {
  uint16_t bits;
  std::memcpy(&bits, halves + row * sizeof(bits), sizeof(bits));
  return from_f16(bits);
}

// The record with the scales of a column.
template <class Byte>
Byte* record_of(const PanelLayout& layout, Byte* panel, int column) {
  return panel + layout.header_offset + kPanelHeaderBytes + column / layout.record_k * layout.scale_stride;
}

void put_scales(const PanelLayout& layout, uint8_t* record, int row, const BlockParts& parts) {
  const int groups = layout.record_k / layout.group_k;
  switch (layout.scale_type) {
    case ScaleType::kE8m0:
      if (parts.d == kE8m0Nan) {
        throw std::invalid_argument("a scale is the ue8m0 byte 255, which is not a number; the file is damaged");
      }
      record[row] = static_cast<uint8_t>(parts.d);
      return;
    case ScaleType::kF16Min:
      write_half(record + kHalves, row, parts.dmin);
      [[fallthrough]];
    case ScaleType::kF16:
      write_half(record, row, parts.d);
      return;
    case ScaleType::kSuper:
      write_half(record, row, parts.d);
      for (int g = 0; g < groups; ++g) record[kHalves + g * kBytes + row] = static_cast<uint8_t>(parts.sc[g]);
      return;
    case ScaleType::kSuperMin:
      write_half(record, row, parts.d);
      write_half(record + kHalves, row, parts.dmin);
      for (int g = 0; g < groups; ++g) {
        record[2 * kHalves + 2 * g * kBytes + row] = static_cast<uint8_t>(parts.sc[g]);
        record[2 * kHalves + (2 * g + 1) * kBytes + row] = parts.m[g];
      }
      return;
    case ScaleType::kSuperMin4:
      write_half(record, row, parts.d);
      write_half(record + kHalves, row, parts.dmin);
      for (int g = 0; g < groups; ++g) {
        record[2 * kHalves + g * kBytes + row] = static_cast<uint8_t>(parts.sc[g] | parts.m[g] << 4);
      }
      return;
    default:
      __builtin_unreachable();
  }
}

// Value of a number of a group: scale * code + low; each is one rounding of the exact product at most, and none for
// finite d.
struct GroupScale {
  float scale;
  float low;
};

// Adding it changes no number, zeros of either sign included.
constexpr float kNoLow = -0.0f;

// Of all groups of a record.
void take_scales(const PanelLayout& layout, const uint8_t* record, int row, GroupScale* out) {
  const int groups = layout.record_k / layout.group_k;
  switch (layout.scale_type) {
    case ScaleType::kE8m0:
      out[0] = {static_cast<float>(from_e8m0(record[row])), kNoLow};
      return;
    case ScaleType::kF16:
      out[0] = {read_half(record, row), kNoLow};
      return;
    case ScaleType::kF16Min:
      out[0] = {read_half(record, row), read_half(record + kHalves, row)};
      return;
    case ScaleType::kSuper: {
      const float d = read_half(record, row);
      for (int g = 0; g < groups; ++g) {
        out[g] = {d * static_cast<int8_t>(record[kHalves + g * kBytes + row]), kNoLow};
      }
      return;
    }
    case ScaleType::kSuperMin:
    case ScaleType::kSuperMin4: {
      const float d = read_half(record, row);
      const float e = read_half(record + kHalves, row);
      const uint8_t* bytes = record + 2 * kHalves + row;
      for (int g = 0; g < groups; ++g) {
        const bool packed = layout.scale_type == ScaleType::kSuperMin4;
        const int s = packed ? bytes[g * kBytes] & 15 : bytes[2 * g * kBytes];
        const int m = packed ? bytes[g * kBytes] >> 4 : bytes[(2 * g + 1) * kBytes];
        out[g] = {d * static_cast<float>(s), -e * static_cast<float>(m)};
      }
      return;
    }
    default:
      __builtin_unreachable();
  }
}

// What codes mean, as small integers: a table, or the codes less an offset. Signed bytes stay what they are.
struct Meaning {
  int8_t table[16];
  bool looked_up;
  int offset;
  float factor;

  explicit Meaning(const Format& format)
      : table{}, looked_up(format.table != nullptr), offset(format.code_offset), factor(1) {
    if (!looked_up) return;
    float values[16];
    std::transform(format.table->bf16, format.table->bf16 + 16, values, from_bf16);
    const bool whole = std::all_of(values, values + 16, [](float v) { return v == std::floor(v); });
    factor = whole ? 1 : 0.5f;
    for (int i = 0; i < 16; ++i) table[i] = static_cast<int8_t>(values[i] / factor);
  }
  void apply(uint8_t* codes, int count) const {
    if (looked_up) {
      for (int i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(table[codes[i]]);
    } else {
      for (int i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(codes[i] - offset);
    }
  }
};

// Rounded to nearest even; NaN stays NaN. `count` is a multiple of 16.
void write_group(const int8_t* codes, int count, const GroupScale& group, uint16_t* out) {
  for (int i = 0; i < count; ++i) {
    const float value = group.scale * static_cast<float>(codes[i]) + group.low;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);
    const uint32_t quiet = bits | 0x400000;
    out[i] = static_cast<uint16_t>((value == value ? rounded : quiet) >> 16);
  }
}

// The numbers of columns [column, +count) of one row, both multiples of 32.
void write_numbers(const CodeKind& kind, const PanelLayout& layout, const Meaning& meaning, const uint8_t* panel,
                   int row, int column, int count, uint16_t* out) {
  constexpr int kMostGroups = kBlockColumns / kSmallestStepK;
  alignas(16) uint8_t codes[kBlockColumns];
  kind.take(panel, row, column, codes, count);
  meaning.apply(codes, count);
  int done = 0;
  while (done < count) {
    GroupScale groups[kMostGroups];
    take_scales(layout, record_of(layout, panel, column + done), row, groups);
    const int record_end = layout.record_k - (column + done) % layout.record_k;
    const int end = done + std::min(count - done, record_end);
    for (; done < end; done += layout.group_k) {
      GroupScale group = groups[(column + done) % layout.record_k / layout.group_k];
      group.scale *= meaning.factor;
      write_group(reinterpret_cast<int8_t*>(codes + done), layout.group_k, group, out + done);
    }
  }
}

}  // namespace

void pack_gguf_panel(const Format& format, const PanelLayout& layout, const MatrixSource& source, MatrixShape shape,
                     int index, uint8_t* panel) {
  const GgufType& blocks = *format.blocks;
  const CodeKind& kind = code_kind(format.codes);
  const int first = index * kPanelRows;
  const int rows = std::clamp(shape.rows - first, 0, kPanelRows);
  const size_t row_bytes = static_cast<size_t>(shape.k / blocks.columns) * blocks.bytes;
  if (rows < kPanelRows) std::memset(panel, 0, layout.panel_bytes);
  std::memset(panel + layout.header_offset, 0, kPanelHeaderBytes);
  BlockParts parts;
  for (int begin = 0; begin < shape.k; begin += kBlockColumns) {
    const int end = std::min(begin + kBlockColumns, shape.k);
    for (int r = 0; r < rows; ++r) {
      const uint8_t* block = source.codes + (first + r) * row_bytes + begin / blocks.columns * blocks.bytes;
      for (int k = begin; k < end; k += blocks.columns, block += blocks.bytes) {
        blocks.parts(block, parts);
        kind.put(panel, r, k, parts.codes, blocks.columns);
        put_scales(layout, record_of(layout, panel, k), r, parts);
      }
    }
  }
}

void unpack_gguf_panel(const Format& format, const PanelLayout& layout, const uint8_t* panel, int index,
                       const MatrixPart& part, const MatrixTarget& target) {
  const CodeKind& kind = code_kind(format.codes);
  const Meaning meaning(format);
  const int first = index * kPanelRows;
  const int begin = std::max(0, part.row - first);
  const int end = std::min(kPanelRows, part.row + part.rows - first);
  uint16_t* const out = reinterpret_cast<uint16_t*>(target.codes);
  // A part may begin and end within 32 columns.
  const int first_column = part.column / 32 * 32;
  const int last_column = (part.column + part.columns + 31) / 32 * 32;
  for (int column = first_column; column < last_column; column += kBlockColumns) {
    const int count = std::min(kBlockColumns, last_column - column);
    const int from = std::max(column, part.column);
    const int to = std::min(column + count, part.column + part.columns);
    for (int r = begin; r < end; ++r) {
      uint16_t* const row = out + static_cast<size_t>(first + r - part.row) * part.columns;
      if (from == column && to == column + count) {
        write_numbers(kind, layout, meaning, panel, r, column, count, row + (column - part.column));
        continue;
      }
      uint16_t numbers[kBlockColumns];
      write_numbers(kind, layout, meaning, panel, r, column, count, numbers);
      std::copy(numbers + (from - column), numbers + (to - column), row + (from - part.column));
    }
  }
}

double gguf_element(const Format& format, const PanelLayout& layout, const uint8_t* panel, int row, int column) {
  GroupScale groups[kBlockColumns / kSmallestStepK];
  take_scales(layout, record_of(layout, panel, column), row, groups);
  const GroupScale& group = groups[column % layout.record_k / layout.group_k];
  return code_kind(format.codes).value(format, panel, row, column) * group.scale + group.low;
}

}  // namespace kt
