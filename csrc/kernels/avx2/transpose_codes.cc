// transpose_codes.h, by 128-bit registers: four rows of a chunk, 4 x 4 bytes, are turned within one.
#include <immintrin.h>

#include "kernels/transpose_codes.h"

namespace {

constexpr int kQuads = kt::kPanelRows / 4;  // fours of rows or columns of a tile
constexpr size_t kChunk = 4 * kt::kPanelRows;

inline __m128i load(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
inline void store(uint8_t* to, __m128i bytes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes); }

// A chunk is four columns; 16 bytes of it are four rows, each with its four columns.
void transpose_int8(const kt::PanelLayout&, const uint8_t* from, uint8_t* to) {
  const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int rows = 0; rows < kQuads; ++rows) {
    for (int columns = 0; columns < kQuads; ++columns) {
      store(to + rows * kChunk + columns * 16, _mm_shuffle_epi8(load(from + columns * kChunk + rows * 16), turn));
    }
  }
}

// A chunk is eight columns; the bytes of a row's word hold columns 0 and 2, 4 and 6, 1 and 3, 5 and 7.
void transpose_code4(const kt::PanelLayout& layout, const uint8_t* from, uint8_t* to) {
  const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);  // to 0|2 1|3 4|6 5|7
  const __m128i nibble = _mm_set1_epi8(15);
  const __m128i integers = _mm_sub_epi8(load(layout.integers), _mm_set1_epi8(static_cast<char>(layout.integer_offset)));
  for (int rows = 0; rows < kQuads; ++rows) {
    for (int columns = 0; columns < kQuads; columns += 2) {
      const __m128i words = _mm_shuffle_epi8(load(from + columns / 2 * kChunk + rows * 16), turn);
      const __m128i low = _mm_shuffle_epi8(integers, _mm_and_si128(words, nibble));  // columns 0 1 4 5
      const __m128i high = _mm_shuffle_epi8(integers, _mm_and_si128(_mm_srli_epi16(words, 4), nibble));
      uint8_t* const out = to + rows * kChunk + columns * 16;
      store(out, _mm_unpacklo_epi64(low, high));
      store(out + 16, _mm_unpackhi_epi64(low, high));
    }
  }
}

}  // namespace

constexpr kt::TransposeCodes kt::kTransposeCodes = {transpose_int8, transpose_code4};
