// Codes from panel order back to checkpoint order: what layerwise prefill waits for, so it should cost little more than
// copying. Blocks of rows and columns are transposed in registers (SSE2, which every x86-64 has), a cache line of each
// row at a time; what does not fill a block goes code by code.
#include <emmintrin.h>

#include <algorithm>

#include "formats/panel_chunks.h"
#include "formats/panel_codes.h"

namespace kt {
namespace {

// The rows of a panel that lie in a part, and where the first of them is written.
struct PanelRows {
  int begin;
  int end;
  int local;  // the first one's place in the part
};

PanelRows rows_of(int index, const MatrixPart& part) {
  const int first = index * kPanelRows;
  const int begin = std::max(0, part.row - first);
  return {begin, std::min(kPanelRows, part.row + part.rows - first), first + begin - part.row};
}

// The chunks of a block are asked for this long before their turn; beyond the panel stands the next one, and asking for
// memory that does not exist is allowed. One thread of a Xeon 5 (Emerald Rapids), 2026-11-21, GB/s of BF16 / E4M3 /
// 4-bit codes from memory: none 6.2 / 4.5 / 4.4, 2 KiB 6.0 / 5.5 / 5.6, 4 KiB 6.2 / 5.8 / 5.9, 8 KiB 6.3 / 5.2 / 5.1;
// memcpy 9.
constexpr size_t kAhead = 4096;

void prefetch(const uint8_t* block, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(block) + kAhead + i, _MM_HINT_T0);
  }
}

__m128i load(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
void store(uint8_t* to, __m128i value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value); }

// What a panel's word becomes in the checkpoint.
struct SameWord {
  template <class Word>
  Word operator()(Word x) const {
    return x;
  }
};
struct AscendingNibbles {
  template <class Word>
  Word operator()(Word x) const {
    return from_panel_word(x);
  }
};

// Words of 4 chunks and 4 rows, transposed.
template <class Restore>
void four_by_four(const uint8_t* from, uint8_t* to, size_t row_bytes, Restore restore) {
  __m128i a = load(from);
  __m128i b = load(from + kWordChunk);
  __m128i c = load(from + 2 * kWordChunk);
  __m128i d = load(from + 3 * kWordChunk);
  const __m128i ab_low = _mm_unpacklo_epi32(a, b);
  const __m128i ab_high = _mm_unpackhi_epi32(a, b);
  const __m128i cd_low = _mm_unpacklo_epi32(c, d);
  const __m128i cd_high = _mm_unpackhi_epi32(c, d);
  const auto put = [&](int row, __m128i words) { store(to + row * row_bytes, (__m128i)restore((Words4)words)); };
  put(0, _mm_unpacklo_epi64(ab_low, cd_low));
  put(1, _mm_unpackhi_epi64(ab_low, cd_low));
  put(2, _mm_unpacklo_epi64(ab_high, cd_high));
  put(3, _mm_unpackhi_epi64(ab_high, cd_high));
}

// Row r of `out` gets the words of row r of the panel, one of each of `count` chunks.
template <class Restore>
void words_by_row(const uint8_t* chunks, int count, const PanelRows& rows, uint8_t* out, size_t row_bytes,
                  Restore restore) {
  constexpr int kBlock = 16;  // words: a cache line of each row
  for (int block = 0; block < count; block += kBlock) {
    const int end = std::min(block + kBlock, count);
    prefetch(chunks + block * size_t{kWordChunk}, kBlock * size_t{kWordChunk});
    for (int r = rows.begin; r < rows.end;) {
      const int step = rows.end - r >= 4 ? 4 : 1;
      const uint8_t* from = chunks + r * 4;
      uint8_t* to = out + (r - rows.begin) * row_bytes;
      int w = block;
      if (step == 4) {
        for (; w + 4 <= end; w += 4)
          four_by_four(from + w * size_t{kWordChunk}, to + w * size_t{4}, row_bytes, restore);
      }
      for (; w < end; ++w) {
        for (int i = 0; i < step; ++i) {
          write(to + i * row_bytes + w * size_t{4}, restore(read<uint32_t>(from + w * size_t{kWordChunk} + i * 4)));
        }
      }
      r += step;
    }
  }
}

void unpack_bf16(const uint8_t* panel, const PanelRows& rows, const MatrixPart& part, uint8_t* out) {
  const size_t row_bytes = part.columns * size_t{2};
  int done = 0;
  if (part.column % 2 == 0) {
    words_by_row(panel + part.column / 2 * size_t{kWordChunk}, part.columns / 2, rows, out, row_bytes, SameWord());
    done = part.columns / 2 * 2;
  }
  for (int r = rows.begin; r < rows.end; ++r, out += row_bytes) {
    for (int c = done; c < part.columns; ++c) {
      const int column = part.column + c;
      write(out + 2 * c, read<uint16_t>(panel + column / 2 * size_t{kWordChunk} + r * 4 + column % 2 * 2));
    }
  }
}

// 8 chunks (16 columns) of the 8 rows whose codes stand at `from` in the first of them.
void sixteen_by_eight(const uint8_t* from, uint8_t* to, size_t row_bytes) {
  __m128i pairs[8];  // of a row's two codes in a chunk, one for each row
  for (int i = 0; i < 8; ++i) {
    const __m128i codes = load(from + i * kByteChunk);
    pairs[i] = _mm_unpacklo_epi8(codes, _mm_unpackhi_epi64(codes, codes));
  }
  __m128i fours[8];  // [2 i]: rows 0-3 of chunks 2i and 2i+1, [2 i + 1]: rows 4-7
  for (int i = 0; i < 4; ++i) {
    fours[2 * i] = _mm_unpacklo_epi16(pairs[2 * i], pairs[2 * i + 1]);
    fours[2 * i + 1] = _mm_unpackhi_epi16(pairs[2 * i], pairs[2 * i + 1]);
  }
  for (int half = 0; half < 2; ++half) {
    const __m128i low_01 = _mm_unpacklo_epi32(fours[half], fours[2 + half]);
    const __m128i high_01 = _mm_unpackhi_epi32(fours[half], fours[2 + half]);
    const __m128i low_23 = _mm_unpacklo_epi32(fours[4 + half], fours[6 + half]);
    const __m128i high_23 = _mm_unpackhi_epi32(fours[4 + half], fours[6 + half]);
    uint8_t* const row = to + 4 * half * row_bytes;
    store(row, _mm_unpacklo_epi64(low_01, low_23));
    store(row + row_bytes, _mm_unpackhi_epi64(low_01, low_23));
    store(row + 2 * row_bytes, _mm_unpacklo_epi64(high_01, high_23));
    store(row + 3 * row_bytes, _mm_unpackhi_epi64(high_01, high_23));
  }
}

void unpack_bytes(const uint8_t* panel, const PanelRows& rows, const MatrixPart& part, uint8_t* out) {
  constexpr int kStep = 16;   // columns
  constexpr int kBlock = 64;  // columns: a cache line of each row
  const size_t row_bytes = part.columns;
  const auto one_by_one = [&](int row, int begin, int end) {
    const uint8_t* from = panel + byte_position(row);
    uint8_t* to = out + (row - rows.begin) * row_bytes;
    for (int c = begin; c < end; ++c) {
      const int column = part.column + c;
      to[c] = from[column / 2 * size_t{kByteChunk} + column % 2 * kNextColumn];
    }
  };
  for (int block = 0; block < part.columns; block += kBlock) {
    const int end = std::min(block + kBlock, part.columns);
    prefetch(panel + (part.column + block) / 2 * size_t{kByteChunk}, kBlock / 2 * size_t{kByteChunk});
    for (int r = rows.begin; r < rows.end;) {
      if (r % 8 != 0 || rows.end - r < 8 || part.column % 2 != 0) {
        one_by_one(r++, block, end);
        continue;
      }
      const uint8_t* from = panel + part.column / 2 * size_t{kByteChunk} + byte_position(r);
      uint8_t* to = out + (r - rows.begin) * row_bytes;
      int c = block;
      for (; c + kStep <= end; c += kStep) sixteen_by_eight(from + c / 2 * size_t{kByteChunk}, to + c, row_bytes);
      for (int i = 0; i < 8; ++i) one_by_one(r++, c, end);
    }
  }
}

void unpack_nibbles(const Format& format, const uint8_t* panel, const PanelRows& rows, const MatrixPart& part,
                    uint8_t* out) {
  const size_t row_bytes = code4_row_bytes(format, part.columns);
  int done = 0;
  if (part.column % 8 == 0) {
    words_by_row(panel + part.column / 8 * size_t{kWordChunk}, part.columns / 8, rows, out, row_bytes,
                 AscendingNibbles());
    done = part.columns / 8 * 8;
  }
  const uint8_t padding = static_cast<uint8_t>(0x11 * format.table->zero_code);
  for (int r = rows.begin; r < rows.end; ++r, out += row_bytes) {
    for (int c = done; c < part.columns; c += 2) {
      const int second = c + 1 < part.columns ? nibble_at(panel, r, part.column + c + 1) : format.table->zero_code;
      out[c / 2] = static_cast<uint8_t>(nibble_at(panel, r, part.column + c) | second << 4);
    }
    for (size_t b = (part.columns + 1) / 2; b < row_bytes; ++b) out[b] = padding;
  }
}

void unpack_transposed_nibbles(const uint8_t* panel, const PanelRows& rows, const MatrixPart& part,
                               const MatrixTarget& target) {
  for (int c = 0; c < part.columns; c += 8) {
    const uint8_t* from = panel + (part.column + c) / 8 * size_t{kWordChunk};
    uint8_t* to = target.codes + (static_cast<size_t>(c / 8) * target.row_length + rows.local) * 4;
    int r = rows.begin;
    for (; r + 4 <= rows.end; r += 4, to += 16) store(to, (__m128i)from_panel_word((Words4)load(from + r * 4)));
    for (; r < rows.end; ++r, to += 4) write(to, from_panel_word(read<uint32_t>(from + r * 4)));
  }
}

}  // namespace

void unpack_codes(const Format& format, const uint8_t* panel, int index, const MatrixPart& part,
                  const MatrixTarget& target) {
  const PanelRows rows = rows_of(index, part);
  if (rows.begin >= rows.end) return;
  if (format.order == Order::kTransposed) return unpack_transposed_nibbles(panel, rows, part, target);
  const size_t local = rows.local;
  switch (format.codes) {
    case CodeType::kBf16:
      return unpack_bf16(panel, rows, part, target.codes + local * part.columns * 2);
    case CodeType::kE4m3:
      return unpack_bytes(panel, rows, part, target.codes + local * part.columns);
    case CodeType::kCode4:
      return unpack_nibbles(format, panel, rows, part, target.codes + local * code4_row_bytes(format, part.columns));
  }
}

}  // namespace kt
