// What the code types share: a code of the checkpoint moved into the 32-bit words of a panel's chunks and back. Writing
// back is what layerwise prefill waits for, so it should cost little more than copying: blocks of rows and columns are
// transposed in registers (SSE2, which every x86-64 has), a cache line of each row at a time; what does not fill a
// block goes code by code.
#pragma once

#include <emmintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "formats/codes/code_kind.h"

namespace kt {

constexpr size_t kWordChunk = 128;  // a 32-bit word of each row
constexpr size_t kCacheLine = 64;

using Words4 = uint32_t __attribute__((vector_size(16)));

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

inline __m128i load(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
inline void store(uint8_t* to, __m128i value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value); }

// The chunks of a block are asked for this long before their turn; beyond the panel stands the next one, and asking for
// memory that does not exist is allowed. One thread of a Xeon 5 (Emerald Rapids), 2026-11-21, GB/s of BF16 / E4M3 /
// 4-bit codes from memory: none 6.2 / 4.5 / 4.4, 2 KiB 6.0 / 5.5 / 5.6, 4 KiB 6.2 / 5.8 / 5.9, 8 KiB 6.3 / 5.2 / 5.1;
// memcpy 9.
constexpr size_t kAhead = 4096;

inline void prefetch(const uint8_t* block, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kCacheLine) {
    _mm_prefetch(reinterpret_cast<const char*>(block) + kAhead + i, _MM_HINT_T0);
  }
}

// Words of 4 chunks and 4 rows, transposed. `restore` makes a word of the checkpoint of a panel's.
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
  constexpr int kBlock = kCacheLine / 4;  // words
  for (int block = 0; block < count; block += kBlock) {
    const int end = std::min(block + kBlock, count);
    prefetch(chunks + block * kWordChunk, kBlock * kWordChunk);
    for (int r = rows.begin; r < rows.end;) {
      const int step = rows.end - r >= 4 ? 4 : 1;
      const uint8_t* from = chunks + r * 4;
      uint8_t* to = out + (r - rows.begin) * row_bytes;
      int w = block;
      if (step == 4) {
        for (; w + 4 <= end; w += 4) four_by_four(from + w * kWordChunk, to + w * size_t{4}, row_bytes, restore);
      }
      for (; w < end; ++w) {
        for (int i = 0; i < step; ++i) {
          write(to + i * row_bytes + w * size_t{4}, restore(read<uint32_t>(from + w * kWordChunk + i * 4)));
        }
      }
      r += step;
    }
  }
}

// ---- codes of one, two or four bytes that stand in a word in ascending columns: [K_padded / n][32][n], n = 4 / their
// size ----

template <class Code>
constexpr int kWordColumns = 4 / sizeof(Code);

template <class Code>
const uint8_t* code_in_words(const uint8_t* panel, int row, int column) {
  constexpr int n = kWordColumns<Code>;
  return panel + column / n * kWordChunk + row * 4 + column % n * sizeof(Code);
}

template <class Code>
void pack_words(const CodeSource& source, uint8_t* panel) {
  const size_t row_bytes = source.shape.k * sizeof(Code);
  const uint8_t* first = source.codes + static_cast<size_t>(source.index) * kPanelRows * row_bytes;
  for (size_t begin = 0; begin < row_bytes; begin += kCacheLine) {
    const size_t end = std::min(begin + kCacheLine, row_bytes);
    for (int r = 0; r < source.rows; ++r) {
      const uint8_t* row = first + r * row_bytes;
      uint8_t* out = panel + r * 4;
      size_t b = begin;
      for (; b + 4 <= end; b += 4) write(out + b / 4 * kWordChunk, read<uint32_t>(row + b));
      if (b < end) std::memcpy(out + b / 4 * kWordChunk, row + b, end - b);
    }
  }
}

template <class Code>
void unpack_words(const uint8_t* panel, const PanelRows& rows, const MatrixPart& part, uint8_t* out) {
  constexpr int n = kWordColumns<Code>;
  const size_t row_bytes = part.columns * sizeof(Code);
  int done = 0;
  if (part.column % n == 0) {
    words_by_row(panel + part.column / n * kWordChunk, part.columns / n, rows, out, row_bytes,
                 [](auto word) { return word; });
    done = part.columns / n * n;
  }
  for (int r = rows.begin; r < rows.end; ++r, out += row_bytes) {
    for (int c = done; c < part.columns; ++c) {
      std::memcpy(out + c * sizeof(Code), code_in_words<Code>(panel, r, part.column + c), sizeof(Code));
    }
  }
}

}  // namespace kt
