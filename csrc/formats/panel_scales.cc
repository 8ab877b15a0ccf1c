#include "formats/panel_scales.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>

#include "formats/numbers.h"

namespace kt {
namespace {

constexpr uint8_t kE8m0Nan = 255;

// Scales of one matrix in the checkpoint: `stride_row` and `stride_group` count elements.
struct SourceScales {
  const uint8_t* data;
  ScaleType type;
  size_t stride_row;
  size_t stride_group;
};

int groups_of(const PanelLayout& layout, MatrixShape shape) { return (shape.k + layout.group_k - 1) / layout.group_k; }

SourceScales source_scales(const Format& format, const PanelLayout& layout, const FormatOptions& options,
                           const uint8_t* data, MatrixShape shape) {
  const bool bytes = layout.scale_type == ScaleType::kE8m0 || layout.scale_type == ScaleType::kE4m3;
  const ScaleType type = bytes ? layout.scale_type : as_scale_type(options.scale_dtype);
  if (format.order == Order::kTransposed) return {data, type, 1, static_cast<size_t>(shape.rows)};
  return {data, type, static_cast<size_t>(groups_of(layout, shape)), 1};
}

float to_float(const uint8_t* from, ScaleType type) {
  uint16_t half;
  float value;
  switch (type) {
    case ScaleType::kBf16:
      std::memcpy(&half, from, sizeof(half));
      return from_bf16(half);
    case ScaleType::kF16:
      std::memcpy(&half, from, sizeof(half));
      return from_f16(half);
    case ScaleType::kE8m0:
      return static_cast<float>(from_e8m0(*from));
    case ScaleType::kE4m3:
      return static_cast<float>(from_e4m3(*from));
    default:
      std::memcpy(&value, from, sizeof(value));
      return value;
  }
}

bool any_e4m3_nan(const uint8_t* scales, int count) {
  return std::any_of(scales, scales + count, [](uint8_t scale) { return (scale & 0x7F) == 0x7F; });
}

void require_numbers(const uint8_t* e8m0, int groups, int row, int group_k) {
  const void* nan = std::memchr(e8m0, kE8m0Nan, groups);
  if (nan == nullptr) return;
  const int group = static_cast<int>(static_cast<const uint8_t*>(nan) - e8m0);
  throw std::invalid_argument("the scale of row " + std::to_string(row) + ", columns from " +
                              std::to_string(group * group_k) +
                              " is the ue8m0 byte 255, which is not a number; the file is damaged");
}

// As fp32.
void widen(const uint8_t* from, ScaleType type, uint8_t* to) {
  const float value = to_float(from, type);
  std::memcpy(to, &value, sizeof(value));
}

// 2^(byte - 127) as bf16, which holds all of them; the smallest is denormal.
uint16_t bf16_of_e8m0(uint8_t byte) { return byte == 0 ? 0x0040 : static_cast<uint16_t>(byte << 7); }

template <size_t kBytes>
void copy_strided(const uint8_t* from, size_t from_stride, uint8_t* to, size_t to_stride, int count) {
  for (int i = 0; i < count; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, kBytes);
}

// `count` scales, each so many bytes after the one before. Widths are constants in the loops: a call per scale took
// most of the time of loading NVFP4, and of writing MXFP4 back.
void convert_strided(const uint8_t* from, ScaleType from_type, size_t from_stride, uint8_t* to, ScaleType to_type,
                     size_t to_stride, int count) {
  const size_t size = scale_bytes(from_type);
  if (from_type == ScaleType::kE8m0 && to_type == ScaleType::kBf16) {
    for (int i = 0; i < count; ++i) {
      const uint16_t bits = bf16_of_e8m0(from[i * from_stride]);
      std::memcpy(to + i * to_stride, &bits, sizeof(bits));
    }
  } else if (size != scale_bytes(to_type)) {
    for (int i = 0; i < count; ++i) widen(from + i * from_stride, from_type, to + i * to_stride);
  } else if (size == 1) {
    copy_strided<1>(from, from_stride, to, to_stride, count);
  } else if (size == 2) {
    copy_strided<2>(from, from_stride, to, to_stride, count);
  } else {
    copy_strided<4>(from, from_stride, to, to_stride, count);
  }
}

const uint8_t* records(const PanelLayout& layout, const uint8_t* panel) {
  return panel + layout.header_offset + kPanelHeaderBytes;
}

// A record's entry for one row of the panel.
const uint8_t* entry(const PanelLayout& layout, const uint8_t* panel, int row, int group) {
  const int at = layout.scale_type == ScaleType::kScalar ? 0 : row;
  return records(layout, panel) + group * layout.scale_stride + at * scale_bytes(layout.scale_type);
}

}  // namespace

ScaleType as_scale_type(DType dtype) {
  switch (dtype) {
    case DType::kBf16:
      return ScaleType::kBf16;
    case DType::kF16:
      return ScaleType::kF16;
    case DType::kF32:
      return ScaleType::kF32;
  }
  __builtin_unreachable();
}

size_t scale_bytes(ScaleType type) {
  switch (type) {
    case ScaleType::kNone:
      return 0;
    case ScaleType::kScalar:
    case ScaleType::kF32:
      return 4;
    case ScaleType::kBf16:
    case ScaleType::kF16:
      return 2;
    case ScaleType::kE8m0:
    case ScaleType::kE4m3:
      return 1;
    case ScaleType::kF16Min:
    case ScaleType::kSuper:
    case ScaleType::kSuperMin:
    case ScaleType::kSuperMin4:
      break;
  }
  __builtin_unreachable();
}

int record_columns(ScaleType type, int group_k) {
  const bool super = type == ScaleType::kSuper || type == ScaleType::kSuperMin || type == ScaleType::kSuperMin4;
  return super ? kSuperK : group_k;
}

size_t record_bytes(ScaleType type, int groups) {
  constexpr size_t kHalves = 2 * kPanelRows, kBytes = kPanelRows;
  switch (type) {
    case ScaleType::kScalar:
      return scale_bytes(type);
    case ScaleType::kF16Min:
      return 2 * kHalves;
    case ScaleType::kSuper:
      return kHalves + groups * kBytes;
    case ScaleType::kSuperMin:
      return 2 * kHalves + groups * 2 * kBytes;
    case ScaleType::kSuperMin4:
      return 2 * kHalves + groups * kBytes;
    default:
      return kPanelRows * scale_bytes(type);
  }
}

void pack_scales(const Format& format, const PanelLayout& layout, const FormatOptions& options,
                 const MatrixSource& source, MatrixShape shape, int index, uint8_t* panel) {
  if (layout.scale_type == ScaleType::kNone) return;
  std::memset(panel + layout.header_offset + kPanelHeaderBytes, 0,
              layout.panel_bytes - layout.header_offset - kPanelHeaderBytes);
  PanelHeader header;
  std::memcpy(&header, panel + layout.header_offset, sizeof(header));
  header.factor = source.factor;
  const SourceScales scales = source_scales(format, layout, options, source.scales, shape);
  const size_t size = scale_bytes(scales.type);
  const int groups = groups_of(layout, shape);
  const int first = index * kPanelRows;
  const int rows = layout.scale_type == ScaleType::kScalar ? 1 : std::clamp(shape.rows - first, 0, kPanelRows);
  for (int r = 0; r < rows; ++r) {
    const uint8_t* from = scales.data + (first + r) / format.rows_per_scale * scales.stride_row * size;
    if (scales.type == ScaleType::kE4m3 && any_e4m3_nan(from, groups)) header.nan_rows |= 1u << r;
    if (scales.type == ScaleType::kE8m0) require_numbers(from, groups, first + r, layout.group_k);
    convert_strided(from, scales.type, scales.stride_group * size, const_cast<uint8_t*>(entry(layout, panel, r, 0)),
                    layout.scale_type, layout.scale_stride, groups);
  }
  std::memcpy(panel + layout.header_offset, &header, sizeof(header));
}

void unpack_scales(const Format& format, const PanelLayout& layout, const uint8_t* panel, int index,
                   const MatrixPart& part, const MatrixTarget& target) {
  if (layout.scale_type == ScaleType::kNone) return;
  const ScaleType type = format.written_scale == ScaleType::kNone ? layout.scale_type : format.written_scale;
  const size_t size = scale_bytes(type);
  const int groups = (part.columns + layout.group_k - 1) / layout.group_k;
  const int first = index * kPanelRows;
  for (int r = std::max(0, part.row - first); r < std::min(kPanelRows, part.row + part.rows - first); ++r) {
    const int local_row = first + r - part.row;
    if (local_row % format.rows_per_scale != 0) continue;
    const bool transposed = format.order == Order::kTransposed;
    const size_t first_scale = transposed ? local_row : static_cast<size_t>(local_row / format.rows_per_scale) * groups;
    convert_strided(entry(layout, panel, r, part.column / layout.group_k), layout.scale_type, layout.scale_stride,
                    target.scales + first_scale * size, type, (transposed ? target.row_length : 1) * size, groups);
  }
}

double scale_value(const PanelLayout& layout, const uint8_t* panel, int row, int column) {
  if (layout.scale_type == ScaleType::kNone) return 1;
  const uint8_t* at = entry(layout, panel, row, column / layout.group_k);
  if (layout.scale_type == ScaleType::kE8m0) return from_e8m0(*at);
  if (layout.scale_type != ScaleType::kE4m3) return to_float(at, layout.scale_type);
  PanelHeader header;
  std::memcpy(&header, panel + layout.header_offset, sizeof(header));
  return from_e4m3(*at) * header.factor;
}

}  // namespace kt
