#include "formats/panel_codes.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "formats/numbers.h"
#include "formats/panel_chunks.h"

namespace kt {
namespace {

int live_rows(MatrixShape shape, int index) { return std::clamp(shape.rows - index * kPanelRows, 0, kPanelRows); }

void pack_bf16(const uint8_t* codes, MatrixShape shape, int index, uint8_t* panel) {
  constexpr int kBlock = 32;  // columns: one cache line of each source row at a time
  for (int begin = 0; begin < shape.k; begin += kBlock) {
    const int end = std::min(begin + kBlock, shape.k);
    for (int r = 0; r < live_rows(shape, index); ++r) {
      const uint8_t* row = codes + (static_cast<size_t>(index) * kPanelRows + r) * shape.k * 2;
      uint8_t* out = panel + r * 4;
      int k = begin;
      for (; k + 2 <= end; k += 2) write(out + k * size_t{64}, read<uint32_t>(row + k * size_t{2}));
      if (k < end) write(out + k * size_t{64}, read<uint16_t>(row + k * size_t{2}));
    }
  }
}

// Returns whether any code of the row is NaN (s1111111).
bool pack_byte_row(const uint8_t* row, int begin, int end, uint8_t* out) {
  constexpr uint64_t kEvery = 0x0101010101010101ull;
  uint64_t nan = 0;
  int k = begin;
  for (; k + 8 <= end; k += 8) {
    const uint64_t eight = read<uint64_t>(row + k);
    nan |= (eight & 0x7F * kEvery) + kEvery;
    for (int i = 0; i < 4; ++i) {
      uint8_t* pair = out + (k / 2 + i) * kByteChunk;
      pair[0] = static_cast<uint8_t>(eight >> 16 * i);
      pair[kNextColumn] = static_cast<uint8_t>(eight >> (16 * i + 8));
    }
  }
  for (; k < end; ++k) {
    nan |= (row[k] & 0x7Fu) + 1;
    out[k / 2 * kByteChunk + k % 2 * kNextColumn] = row[k];
  }
  return (nan & 0x80 * kEvery) != 0;
}

uint32_t pack_bytes(const uint8_t* codes, MatrixShape shape, int index, uint8_t* panel) {
  constexpr int kBlock = 64;
  uint32_t nan_rows = 0;
  for (int begin = 0; begin < shape.k; begin += kBlock) {
    const int end = std::min(begin + kBlock, shape.k);
    for (int r = 0; r < live_rows(shape, index); ++r) {
      const uint8_t* row = codes + (static_cast<size_t>(index) * kPanelRows + r) * shape.k;
      if (pack_byte_row(row, begin, end, panel + byte_position(r))) nan_rows |= 1u << r;
    }
  }
  return nan_rows;
}

void pack_nibbles(const Format& format, const uint8_t* codes, MatrixShape shape, int index, uint8_t* panel) {
  constexpr int kBlock = 128;
  const size_t row_bytes = code4_row_bytes(format, shape.k);
  const uint32_t padding = 0x11111111u * format.table->zero_code;
  for (int begin = 0; begin < shape.k; begin += kBlock) {
    const int end = std::min(begin + kBlock, shape.k);
    for (int r = 0; r < live_rows(shape, index); ++r) {
      const uint8_t* row = codes + (static_cast<size_t>(index) * kPanelRows + r) * row_bytes;
      uint8_t* out = panel + r * 4;
      int k = begin;
      for (; k + 16 <= end; k += 16) {
        const uint64_t words = to_panel_word(read<uint64_t>(row + k / 2));
        write(out + k / 8 * kWordChunk, static_cast<uint32_t>(words));
        write(out + (k / 8 + 1) * kWordChunk, static_cast<uint32_t>(words >> 32));
      }
      for (; k + 8 <= end; k += 8) write(out + k / 8 * kWordChunk, to_panel_word(read<uint32_t>(row + k / 2)));
      if (k == end) continue;
      uint32_t word = 0;
      std::memcpy(&word, row + k / 2, (end - k + 1) / 2);
      const uint32_t beyond = ~0u << 4 * (end - k);  // the checkpoint's own padding does not count
      write(out + k / 8 * kWordChunk, to_panel_word((word & ~beyond) | (padding & beyond)));
    }
  }
}

void pack_transposed_nibbles(const uint8_t* codes, MatrixShape shape, int index, uint8_t* panel) {
  for (int j = 0; j < shape.k / 8; ++j) {
    const uint8_t* words = codes + (static_cast<size_t>(j) * shape.rows + static_cast<size_t>(index) * kPanelRows) * 4;
    uint8_t* out = panel + j * kWordChunk;
    int r = 0;
    for (; r + 2 <= live_rows(shape, index); r += 2) write(out + 4 * r, to_panel_word(read<uint64_t>(words + 4 * r)));
    if (r < live_rows(shape, index)) write(out + 4 * r, to_panel_word(read<uint32_t>(words + 4 * r)));
  }
}

}  // namespace

void pack_codes(const Format& format, const PanelLayout& layout, const uint8_t* codes, MatrixShape shape, int index,
                uint8_t* panel) {
  if (live_rows(shape, index) < kPanelRows || shape.k < layout.k_padded) {
    const int zero = format.codes == CodeType::kCode4 ? 0x11 * format.table->zero_code : 0;
    std::memset(panel, zero, layout.header_offset);
  }
  switch (format.codes) {
    case CodeType::kBf16:
      return pack_bf16(codes, shape, index, panel);
    case CodeType::kE4m3:
      return write(panel + layout.header_offset + offsetof(PanelHeader, nan_rows),
                   pack_bytes(codes, shape, index, panel));
    case CodeType::kCode4:
      if (format.order == Order::kTransposed) return pack_transposed_nibbles(codes, shape, index, panel);
      return pack_nibbles(format, codes, shape, index, panel);
  }
}

double code_value(const Format& format, const uint8_t* panel, int row, int column) {
  switch (format.codes) {
    case CodeType::kBf16:
      return from_bf16(read<uint16_t>(panel + column / 2 * size_t{kWordChunk} + row * 4 + column % 2 * 2));
    case CodeType::kE4m3:
      return from_e4m3(panel[column / 2 * kByteChunk + byte_position(row) + column % 2 * kNextColumn]);
    case CodeType::kCode4:
      return from_bf16(format.table->bf16[nibble_at(panel, row, column)]);
  }
  __builtin_unreachable();
}

}  // namespace kt
