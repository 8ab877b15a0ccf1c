#include "formats/panel_codes.h"

#include <algorithm>
#include <cstring>

#include "formats/numbers.h"

namespace kt {
namespace {

// Where a row's two codes stand in a chunk of 64 bytes.
constexpr int chunk_position(int row) { return row % 16 / 4 * 16 + row / 16 * 8 + row % 4 * 2; }

constexpr int kChunkBytes = 64;

// The 16 bits that a row has in a chunk of 4-bit codes, from the 16 bits of its four columns in ascending order and
// back: the two nibbles in the middle change places. Works on every 16-bit part of a word.
constexpr uint64_t swap_middle_nibbles(uint64_t x) {
  return (x & 0xF00FF00FF00FF00Full) | (x >> 4 & 0x00F000F000F000F0ull) | (x << 4 & 0x0F000F000F000F00ull);
}

template <class T>
T read(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <class T>
void write(uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

int live_rows(MatrixShape shape, int index) { return std::clamp(shape.rows - index * kPanelRows, 0, kPanelRows); }

// A row's bytes in the checkpoint: whole words.
size_t code4_row_bytes(const Format& format, int k) {
  const size_t words = (k + format.columns_per_word - 1) / format.columns_per_word;
  return words * format.columns_per_word / 2;
}

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

void pack_bytes(const uint8_t* codes, MatrixShape shape, int index, uint8_t* panel) {
  constexpr int kBlock = 64;
  for (int begin = 0; begin < shape.k; begin += kBlock) {
    const int end = std::min(begin + kBlock, shape.k);
    for (int r = 0; r < live_rows(shape, index); ++r) {
      const uint8_t* row = codes + (static_cast<size_t>(index) * kPanelRows + r) * shape.k;
      uint8_t* out = panel + chunk_position(r);
      int k = begin;
      for (; k + 8 <= end; k += 8) {
        const uint64_t eight = read<uint64_t>(row + k);
        for (int i = 0; i < 4; ++i) write(out + (k / 2 + i) * kChunkBytes, static_cast<uint16_t>(eight >> 16 * i));
      }
      for (; k < end; ++k) out[k / 2 * kChunkBytes + k % 2] = row[k];
    }
  }
}

void pack_nibbles(const Format& format, const uint8_t* codes, MatrixShape shape, int index, uint8_t* panel) {
  constexpr int kBlock = 128;
  const size_t row_bytes = code4_row_bytes(format, shape.k);
  const uint64_t padding = 0x1111111111111111ull * format.table->zero_code;
  for (int begin = 0; begin < shape.k; begin += kBlock) {
    const int end = std::min(begin + kBlock, shape.k);
    for (int r = 0; r < live_rows(shape, index); ++r) {
      const uint8_t* row = codes + (static_cast<size_t>(index) * kPanelRows + r) * row_bytes;
      uint8_t* out = panel + chunk_position(r);
      for (int k = begin; k < end; k += 16) {
        uint64_t sixteen = padding;
        const int live = std::min(16, end - k);
        std::memcpy(&sixteen, row + k / 2, live == 16 ? 8 : (live + 1) / 2);
        if (live < 16) {  // the checkpoint's own padding does not count
          const uint64_t mask = ~uint64_t{0} << 4 * live;
          sixteen = (sixteen & ~mask) | (padding & mask);
        }
        const uint64_t swapped = swap_middle_nibbles(sixteen);
        for (int i = 0; i < (live + 3) / 4; ++i) {
          write(out + (k / 4 + i) * kChunkBytes, static_cast<uint16_t>(swapped >> 16 * i));
        }
      }
    }
  }
}

void pack_transposed_nibbles(const uint8_t* codes, MatrixShape shape, int index, uint8_t* panel) {
  for (int j = 0; j < shape.k / 8; ++j) {
    const uint8_t* words = codes + (static_cast<size_t>(j) * shape.rows + static_cast<size_t>(index) * kPanelRows) * 4;
    uint8_t* out = panel + 2 * j * kChunkBytes;
    for (int r = 0; r < live_rows(shape, index); ++r) {
      const uint64_t swapped = swap_middle_nibbles(read<uint32_t>(words + 4 * r));
      write(out + chunk_position(r), static_cast<uint16_t>(swapped));
      write(out + chunk_position(r) + kChunkBytes, static_cast<uint16_t>(swapped >> 16));
    }
  }
}

int nibble_at(const uint8_t* panel, int row, int column) {
  const uint8_t byte = panel[column / 4 * kChunkBytes + chunk_position(row) + column % 2];
  return column % 4 < 2 ? byte & 15 : byte >> 4;
}

// Four columns from a multiple of four on, in ascending nibbles.
uint16_t four_nibbles_at(const uint8_t* panel, int row, int column) {
  return static_cast<uint16_t>(
      swap_middle_nibbles(read<uint16_t>(panel + column / 4 * kChunkBytes + chunk_position(row))));
}

void unpack_nibble_row(const Format& format, const uint8_t* panel, int row, const MatrixPart& part, uint8_t* out) {
  int c = 0;
  if (part.column % 4 == 0) {
    for (; c + 4 <= part.columns; c += 4) write(out + c / 2, four_nibbles_at(panel, row, part.column + c));
  }
  for (; c < part.columns; c += 2) {
    const int second = c + 1 < part.columns ? nibble_at(panel, row, part.column + c + 1) : format.table->zero_code;
    out[c / 2] = static_cast<uint8_t>(nibble_at(panel, row, part.column + c) | second << 4);
  }
  const int word_bytes = format.columns_per_word / 2;
  const uint8_t padding = static_cast<uint8_t>(0x11 * format.table->zero_code);
  for (int b = (part.columns + 1) / 2; b % word_bytes != 0; ++b) out[b] = padding;
}

void unpack_row(const Format& format, const uint8_t* panel, int row, const MatrixPart& part, int local_row,
                const MatrixTarget& target) {
  switch (format.codes) {
    case CodeType::kBf16: {
      uint8_t* out = target.codes + static_cast<size_t>(local_row) * part.columns * 2;
      for (int c = 0; c < part.columns; ++c) {
        const int column = part.column + c;
        write(out + 2 * c, read<uint16_t>(panel + column / 2 * size_t{128} + row * 4 + column % 2 * 2));
      }
      return;
    }
    case CodeType::kE4m3: {
      uint8_t* out = target.codes + static_cast<size_t>(local_row) * part.columns;
      const uint8_t* from = panel + chunk_position(row);
      for (int c = 0; c < part.columns; ++c) {
        const int column = part.column + c;
        out[c] = from[column / 2 * size_t{kChunkBytes} + column % 2];
      }
      return;
    }
    case CodeType::kCode4:
      unpack_nibble_row(format, panel, row, part,
                        target.codes + static_cast<size_t>(local_row) * code4_row_bytes(format, part.columns));
      return;
  }
}

void unpack_transposed_row(const uint8_t* panel, int row, const MatrixPart& part, int local_row,
                           const MatrixTarget& target) {
  for (int c = 0; c < part.columns; c += 8) {
    const uint32_t word = four_nibbles_at(panel, row, part.column + c) |
                          static_cast<uint32_t>(four_nibbles_at(panel, row, part.column + c + 4)) << 16;
    write(target.codes + (static_cast<size_t>(c / 8) * target.row_length + local_row) * 4, word);
  }
}

}  // namespace

void pack_codes(const Format& format, const PanelLayout& layout, const uint8_t* codes, MatrixShape shape, int index,
                uint8_t* panel) {
  if (live_rows(shape, index) < kPanelRows || shape.k < layout.k_padded) {
    const int zero = format.codes == CodeType::kCode4 ? 0x11 * format.table->zero_code : 0;
    std::memset(panel, zero, layout.scale_offset);
  }
  switch (format.codes) {
    case CodeType::kBf16:
      return pack_bf16(codes, shape, index, panel);
    case CodeType::kE4m3:
      return pack_bytes(codes, shape, index, panel);
    case CodeType::kCode4:
      if (format.order == Order::kTransposed) return pack_transposed_nibbles(codes, shape, index, panel);
      return pack_nibbles(format, codes, shape, index, panel);
  }
}

void unpack_codes(const Format& format, const uint8_t* panel, int index, const MatrixPart& part,
                  const MatrixTarget& target) {
  const int first = index * kPanelRows;
  for (int r = std::max(0, part.row - first); r < std::min(kPanelRows, part.row + part.rows - first); ++r) {
    const int local_row = first + r - part.row;
    if (format.order == Order::kTransposed) {
      unpack_transposed_row(panel, r, part, local_row, target);
    } else {
      unpack_row(format, panel, r, part, local_row, target);
    }
  }
}

double code_value(const Format& format, const uint8_t* panel, int row, int column) {
  switch (format.codes) {
    case CodeType::kBf16:
      return from_bf16(read<uint16_t>(panel + column / 2 * size_t{128} + row * 4 + column % 2 * 2));
    case CodeType::kE4m3:
      return from_e4m3(panel[column / 2 * kChunkBytes + chunk_position(row) + column % 2]);
    case CodeType::kCode4:
      return from_bf16(format.table->bf16[nibble_at(panel, row, column)]);
  }
  __builtin_unreachable();
}

}  // namespace kt
