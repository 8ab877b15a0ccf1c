#include "formats/codes/code4.h"

#include "formats/codes/dot_words.h"
#include "formats/numbers.h"

namespace kt {
namespace {

// The mask in each 32-bit word of a Word.
template <class Word>
constexpr Word in_each(uint32_t mask) {
  return Word{} + mask;
}
template <>
constexpr uint64_t in_each<uint64_t>(uint32_t mask) {
  return mask * 0x100000001ull;
}

// Eight nibbles in ascending columns -> the word of a chunk, and back. Each line swaps parts of the word. Several words
// at a time: most of what loading and writing back these codes does.
template <class Word>
constexpr Word exchange(Word x, uint32_t mask, int shift) {
  const Word t = (x ^ x >> shift) & in_each<Word>(mask);
  return x ^ t ^ t << shift;
}
template <class Word>
constexpr Word to_panel_word(Word x) {
  x = exchange(x, 0x00F000F0u, 4);     // 0 1 2 3 -> 0 2 1 3 in each half
  return exchange(x, 0x0000FF00u, 8);  // 0 2 1 3 4 6 5 7 -> 0 2 4 6 1 3 5 7
}
template <class Word>
constexpr Word from_panel_word(Word x) {
  return exchange(exchange(x, 0x0000FF00u, 8), 0x00F000F0u, 4);
}

int nibble_at(const uint8_t* panel, int row, int column) {
  const uint32_t eight = from_panel_word(read<uint32_t>(panel + column / 8 * kWordChunk + row * 4));
  return eight >> column % 8 * 4 & 15;
}

void pack_rows(const Format& format, const CodeSource& source, uint8_t* panel) {
  constexpr int kBlock = 2 * kCacheLine;  // columns: a cache line of each row
  const size_t stride = row_bytes(format, source.shape.k);
  const uint32_t padding = 0x11111111u * format.table->zero_code;
  for (int begin = 0; begin < source.shape.k; begin += kBlock) {
    const int end = std::min(begin + kBlock, source.shape.k);
    for (int r = 0; r < source.rows; ++r) {
      const uint8_t* row = source.codes + (static_cast<size_t>(source.index) * kPanelRows + r) * stride;
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

void pack_transposed(const CodeSource& source, uint8_t* panel) {
  const size_t row_of_words = static_cast<size_t>(source.shape.rows) * 4;
  const uint8_t* words = source.codes + static_cast<size_t>(source.index) * kPanelRows * 4;
  for (int j = 0; j < source.shape.k / 8; ++j, words += row_of_words, panel += kWordChunk) {
    int r = 0;
    for (; r + 2 <= source.rows; r += 2) write(panel + 4 * r, to_panel_word(read<uint64_t>(words + 4 * r)));
    if (r < source.rows) write(panel + 4 * r, to_panel_word(read<uint32_t>(words + 4 * r)));
  }
}

uint32_t pack(const Format& format, const CodeSource& source, uint8_t* panel) {
  if (format.order == Order::kTransposed) {
    pack_transposed(source, panel);
  } else {
    pack_rows(format, source, panel);
  }
  return 0;
}

void unpack_rows(const Format& format, const uint8_t* panel, const PanelRows& rows, const MatrixPart& part,
                 const MatrixTarget& target) {
  const size_t stride = row_bytes(format, part.columns);
  uint8_t* out = target.codes + rows.local * stride;
  int done = 0;
  if (part.column % 8 == 0) {
    words_by_row(panel + part.column / 8 * kWordChunk, part.columns / 8, rows, out, stride,
                 [](auto word) { return from_panel_word(word); });
    done = part.columns / 8 * 8;
  }
  const uint8_t padding = static_cast<uint8_t>(0x11 * format.table->zero_code);
  for (int r = rows.begin; r < rows.end; ++r, out += stride) {
    for (int c = done; c < part.columns; c += 2) {
      const int second = c + 1 < part.columns ? nibble_at(panel, r, part.column + c + 1) : format.table->zero_code;
      out[c / 2] = static_cast<uint8_t>(nibble_at(panel, r, part.column + c) | second << 4);
    }
    for (size_t b = (part.columns + 1) / 2; b < stride; ++b) out[b] = padding;
  }
}

void unpack_transposed(const uint8_t* panel, const PanelRows& rows, const MatrixPart& part,
                       const MatrixTarget& target) {
  for (int c = 0; c < part.columns; c += 8) {
    const uint8_t* from = panel + (part.column + c) / 8 * kWordChunk;
    uint8_t* to = target.codes + (static_cast<size_t>(c / 8) * target.row_length + rows.local) * 4;
    int r = rows.begin;
    for (; r + 4 <= rows.end; r += 4, to += 16) store(to, (__m128i)from_panel_word((Words4)load(from + r * 4)));
    for (; r < rows.end; ++r, to += 4) write(to, from_panel_word(read<uint32_t>(from + r * 4)));
  }
}

void unpack(const Format& format, const uint8_t* panel, const PanelRows& rows, const MatrixPart& part,
            const MatrixTarget& target) {
  if (format.order == Order::kTransposed) return unpack_transposed(panel, rows, part, target);
  unpack_rows(format, panel, rows, part, target);
}

struct Code4 {
  using Order = ByNibbles;
  static constexpr int kWords = 4;
  static constexpr uint32_t kLow = 0x0F0F0F0F;

  static void join(const Dots& dots, uint32_t (&words)[kWords]) {
    for (int i = 0; i < kWords; ++i) words[i] = (dots[2 * i] & kLow) | (dots[2 * i + 1] & kLow) << 4;
  }
  static void split(const uint32_t (&words)[kWords], Dots& dots) {
    for (int i = 0; i < kWords; ++i) {
      dots[2 * i] = words[i] & kLow;
      dots[2 * i + 1] = words[i] >> 4 & kLow;
    }
  }
};

double value(const Format& format, const uint8_t* panel, int row, int column) {
  return from_bf16(format.table->bf16[nibble_at(panel, row, column)]);
}

}  // namespace

const CodeKind kCode4Codes = {"code4", 4, pack, unpack, value, put_dots<Code4>, take_dots<Code4>};

}  // namespace kt
