#include "formats/panel_codes.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "formats/numbers.h"

namespace kt {
namespace {

constexpr int kPairBytes = 128;    // bf16: two columns of a panel
constexpr int kByteChunk = 64;     // 8-bit codes: two columns
constexpr int kNibbleChunk = 128;  // 4-bit codes: eight columns

// Where a row's first code stands in a chunk of 8-bit codes; its second is kNextColumn further.
constexpr int byte_position(int row) { return row / 8 * 16 + row % 8; }
constexpr int kNextColumn = 8;

// Eight nibbles in ascending columns -> the word of a 4-bit chunk, and back. Each line swaps parts of the word.
// Two words at a time: half the instructions of what loading 4-bit codes mostly does.
template <class Word>
constexpr Word exchange(Word x, uint32_t mask, int shift) {
  const Word t = (x ^ x >> shift) & static_cast<Word>(mask * 0x100000001ull);
  return x ^ t ^ t << shift;
}
template <class Word>
constexpr Word to_panel_word(Word x) {
  x = exchange(x, 0x00F000F0u, 4);     // 0 1 2 3 -> 0 2 1 3 in each half
  return exchange(x, 0x0000FF00u, 8);  // 0 2 1 3 4 6 5 7 -> 0 2 4 6 1 3 5 7
}
constexpr uint32_t from_panel_word(uint32_t x) { return exchange(exchange(x, 0x0000FF00u, 8), 0x00F000F0u, 4); }

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
        write(out + k / 8 * kNibbleChunk, static_cast<uint32_t>(words));
        write(out + (k / 8 + 1) * kNibbleChunk, static_cast<uint32_t>(words >> 32));
      }
      for (; k + 8 <= end; k += 8) write(out + k / 8 * kNibbleChunk, to_panel_word(read<uint32_t>(row + k / 2)));
      if (k == end) continue;
      uint32_t word = 0;
      std::memcpy(&word, row + k / 2, (end - k + 1) / 2);
      const uint32_t beyond = ~0u << 4 * (end - k);  // the checkpoint's own padding does not count
      write(out + k / 8 * kNibbleChunk, to_panel_word((word & ~beyond) | (padding & beyond)));
    }
  }
}

void pack_transposed_nibbles(const uint8_t* codes, MatrixShape shape, int index, uint8_t* panel) {
  for (int j = 0; j < shape.k / 8; ++j) {
    const uint8_t* words = codes + (static_cast<size_t>(j) * shape.rows + static_cast<size_t>(index) * kPanelRows) * 4;
    uint8_t* out = panel + j * kNibbleChunk;
    int r = 0;
    for (; r + 2 <= live_rows(shape, index); r += 2) write(out + 4 * r, to_panel_word(read<uint64_t>(words + 4 * r)));
    if (r < live_rows(shape, index)) write(out + 4 * r, to_panel_word(read<uint32_t>(words + 4 * r)));
  }
}

// Eight columns from a multiple of eight on, in ascending nibbles.
uint32_t eight_nibbles_at(const uint8_t* panel, int row, int column) {
  return from_panel_word(read<uint32_t>(panel + column / 8 * kNibbleChunk + row * 4));
}

int nibble_at(const uint8_t* panel, int row, int column) {
  return eight_nibbles_at(panel, row, column) >> column % 8 * 4 & 15;
}

void unpack_nibble_row(const Format& format, const uint8_t* panel, int row, const MatrixPart& part, uint8_t* out) {
  int c = 0;
  if (part.column % 8 == 0) {
    for (; c + 8 <= part.columns; c += 8) write(out + c / 2, eight_nibbles_at(panel, row, part.column + c));
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
        write(out + 2 * c, read<uint16_t>(panel + column / 2 * size_t{kPairBytes} + row * 4 + column % 2 * 2));
      }
      return;
    }
    case CodeType::kE4m3: {
      uint8_t* out = target.codes + static_cast<size_t>(local_row) * part.columns;
      const uint8_t* from = panel + byte_position(row);
      for (int c = 0; c < part.columns; ++c) {
        const int column = part.column + c;
        out[c] = from[column / 2 * size_t{kByteChunk} + column % 2 * kNextColumn];
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
    write(target.codes + (static_cast<size_t>(c / 8) * target.row_length + local_row) * 4,
          eight_nibbles_at(panel, row, part.column + c));
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
      return from_bf16(read<uint16_t>(panel + column / 2 * size_t{kPairBytes} + row * 4 + column % 2 * 2));
    case CodeType::kE4m3:
      return from_e4m3(panel[column / 2 * kByteChunk + byte_position(row) + column % 2 * kNextColumn]);
    case CodeType::kCode4:
      return from_bf16(format.table->bf16[nibble_at(panel, row, column)]);
  }
  __builtin_unreachable();
}

}  // namespace kt
