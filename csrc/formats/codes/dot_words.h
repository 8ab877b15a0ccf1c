// Codes of 2 to 8 bits in panels whose kernels multiply bytes four at a time: every 32 columns of a row are eight
// "dots", 32-bit words of four codes, one byte each, and a Layout (one per code type, in the file of its name) says how
// the dots are squeezed into the row's words of the panel. Plain codes go in and out here, one byte each.
//
// A Layout provides
//   kWords                 of a row for 32 columns: as many bits as a code has; word i stands in chunk i (kWordChunk)
//   Order                  which columns a dot has: ByNibbles or Ascending
//   join(dots, words)      and split(words, dots), its inverse
#pragma once

#include "formats/codes/chunks.h"

namespace kt {

constexpr int kDotBlock = 32;  // columns

using Dots = uint32_t[kDotBlock / 4];

// Dot i has columns 4i .. 4i+3.
struct Ascending {
  static void load_dots(const uint8_t* codes, Dots& dots) { std::memcpy(dots, codes, sizeof(dots)); }
  static void store_dots(const Dots& dots, uint8_t* codes) { std::memcpy(codes, dots, sizeof(dots)); }
};

// Dots 2i and 2i+1 have columns 0 4 1 5 and 2 6 3 7 from 8i on: the low and the high nibbles of a word of 4-bit codes
// (code4.h).
struct ByNibbles {
  static void load_dots(const uint8_t* codes, Dots& dots) {
    for (int i = 0; i < kDotBlock; i += 16) {
      const __m128i sixteen = load(codes + i);
      const __m128i fours_later = _mm_srli_epi64(sixteen, 32);
      const __m128i first = _mm_unpacklo_epi8(sixteen, fours_later);
      const __m128i second = _mm_unpackhi_epi8(sixteen, fours_later);
      store(reinterpret_cast<uint8_t*>(dots + i / 4), _mm_unpacklo_epi64(first, second));
    }
  }
  static void store_dots(const Dots& dots, uint8_t* codes) {
    for (int i = 0; i < kDotBlock; i += 16) {
      const __m128i sixteen = load(reinterpret_cast<const uint8_t*>(dots + i / 4));
      const __m128i early = _mm_and_si128(sixteen, _mm_set1_epi16(0xFF));
      const __m128i fours = _mm_packus_epi16(early, _mm_srli_epi16(sixteen, 8));
      store(codes + i, _mm_shuffle_epi32(fours, _MM_SHUFFLE(3, 1, 2, 0)));
    }
  }
};

template <class Layout>
using WordsOf = uint32_t[Layout::kWords];

template <class Layout>
constexpr size_t kDotBlockBytes = Layout::kWords * kWordChunk;

template <class Layout>
void words_at(const uint8_t* panel, int row, int column, WordsOf<Layout>& words) {
  const uint8_t* from = panel + column / kDotBlock * kDotBlockBytes<Layout> + row * 4;
  for (int w = 0; w < Layout::kWords; ++w) words[w] = read<uint32_t>(from + w * kWordChunk);
}

// CodeKind::put and CodeKind::take.
template <class Layout>
void put_dots(uint8_t* panel, int row, int column, const uint8_t* codes, int count) {
  uint8_t* to = panel + column / kDotBlock * kDotBlockBytes<Layout> + row * 4;
  for (int k = 0; k < count; k += kDotBlock, to += kDotBlockBytes<Layout>) {
    Dots dots;
    Layout::Order::load_dots(codes + k, dots);
    WordsOf<Layout> words;
    Layout::join(dots, words);
    for (int w = 0; w < Layout::kWords; ++w) write(to + w * kWordChunk, words[w]);
  }
}

template <class Layout>
void take_dots(const uint8_t* panel, int row, int column, uint8_t* codes, int count) {
  for (int k = 0; k < count; k += kDotBlock) {
    WordsOf<Layout> words;
    words_at<Layout>(panel, row, column + k, words);
    Dots dots;
    Layout::split(words, dots);
    Layout::Order::store_dots(dots, codes + k);
  }
}

template <class Layout>
int code_in_dots(const uint8_t* panel, int row, int column) {
  uint8_t codes[kDotBlock];
  take_dots<Layout>(panel, row, column / kDotBlock * kDotBlock, codes, kDotBlock);
  return codes[column % kDotBlock];
}

// CodeKind::value of codes that are whole numbers but for an offset.
template <class Layout>
double value_in_dots(const Format& format, const uint8_t* panel, int row, int column) {
  return code_in_dots<Layout>(panel, row, column) - format.code_offset;
}

}  // namespace kt
