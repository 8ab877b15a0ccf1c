#include "formats/codes/e4m3.h"

#include "formats/codes/chunks.h"
#include "formats/numbers.h"

namespace kt {
namespace {

constexpr size_t kChunk = 64;      // two columns
constexpr int kNextColumn = 8;     // bytes from a row's first code in a chunk to its second
constexpr int kBlockColumns = 64;  // a cache line of each row

// Where a row's first code stands in a chunk.
constexpr int position(int row) { return row / 8 * 16 + row % 8; }

// Returns whether any code of the row is NaN (s1111111).
bool pack_row(const uint8_t* row, int begin, int end, uint8_t* out) {
  constexpr uint64_t kEvery = 0x0101010101010101ull;
  uint64_t nan = 0;
  int k = begin;
  for (; k + 8 <= end; k += 8) {
    const uint64_t eight = read<uint64_t>(row + k);
    nan |= (eight & 0x7F * kEvery) + kEvery;
    for (int i = 0; i < 4; ++i) {
      uint8_t* pair = out + (k / 2 + i) * kChunk;
      pair[0] = static_cast<uint8_t>(eight >> 16 * i);
      pair[kNextColumn] = static_cast<uint8_t>(eight >> (16 * i + 8));
    }
  }
  for (; k < end; ++k) {
    nan |= (row[k] & 0x7Fu) + 1;
    out[k / 2 * kChunk + k % 2 * kNextColumn] = row[k];
  }
  return (nan & 0x80 * kEvery) != 0;
}

uint32_t pack(const Format&, const CodeSource& source, uint8_t* panel) {
  const int k = source.shape.k;
  uint32_t nan_rows = 0;
  for (int begin = 0; begin < k; begin += kBlockColumns) {
    const int end = std::min(begin + kBlockColumns, k);
    for (int r = 0; r < source.rows; ++r) {
      const uint8_t* row = source.codes + (static_cast<size_t>(source.index) * kPanelRows + r) * k;
      if (pack_row(row, begin, end, panel + position(r))) nan_rows |= 1u << r;
    }
  }
  return nan_rows;
}

// 8 chunks (16 columns) of the 8 rows whose codes stand at `from` in the first of them.
void sixteen_by_eight(const uint8_t* from, uint8_t* to, size_t row_bytes) {
  __m128i pairs[8];  // of a row's two codes in a chunk, one for each row
  for (int i = 0; i < 8; ++i) {
    const __m128i codes = load(from + i * kChunk);
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

void unpack(const Format&, const uint8_t* panel, const PanelRows& rows, const MatrixPart& part,
            const MatrixTarget& target) {
  constexpr int kStep = 16;  // columns
  const size_t row_bytes = part.columns;
  uint8_t* out = target.codes + rows.local * row_bytes;
  const auto one_by_one = [&](int row, int begin, int end) {
    const uint8_t* from = panel + position(row);
    uint8_t* to = out + (row - rows.begin) * row_bytes;
    for (int c = begin; c < end; ++c) {
      const int column = part.column + c;
      to[c] = from[column / 2 * kChunk + column % 2 * kNextColumn];
    }
  };
  for (int block = 0; block < part.columns; block += kBlockColumns) {
    const int end = std::min(block + kBlockColumns, part.columns);
    prefetch(panel + (part.column + block) / 2 * kChunk, kBlockColumns / 2 * kChunk);
    for (int r = rows.begin; r < rows.end;) {
      if (r % 8 != 0 || rows.end - r < 8 || part.column % 2 != 0) {
        one_by_one(r++, block, end);
        continue;
      }
      const uint8_t* from = panel + part.column / 2 * kChunk + position(r);
      uint8_t* to = out + (r - rows.begin) * row_bytes;
      int c = block;
      for (; c + kStep <= end; c += kStep) sixteen_by_eight(from + c / 2 * kChunk, to + c, row_bytes);
      for (int i = 0; i < 8; ++i) one_by_one(r++, c, end);
    }
  }
}

double value(const Format&, const uint8_t* panel, int row, int column) {
  return from_e4m3(panel[column / 2 * kChunk + position(row) + column % 2 * kNextColumn]);
}

}  // namespace

const CodeKind kE4m3Codes = {"e4m3", 8, pack, unpack, value, nullptr, nullptr};

}  // namespace kt
