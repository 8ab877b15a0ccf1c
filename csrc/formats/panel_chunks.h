// Where codes stand in the chunks of a panel (the pictures are in bf16.h, e4m3.h and code4.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "formats/format.h"

namespace kt {

constexpr int kWordChunk = 128;  // a 32-bit word of each row: two columns of bf16, or eight of 4-bit codes
constexpr int kByteChunk = 64;   // 8-bit codes: two columns

// Where a row's first code stands in a chunk of 8-bit codes; its second is kNextColumn further.
constexpr int byte_position(int row) { return row / 8 * 16 + row % 8; }
constexpr int kNextColumn = 8;

using Words4 = uint32_t __attribute__((vector_size(16)));

// The mask in each 32-bit word of a Word.
template <class Word>
constexpr Word in_each(uint32_t mask) {
  return Word{} + mask;
}
template <>
constexpr uint64_t in_each<uint64_t>(uint32_t mask) {
  return mask * 0x100000001ull;
}

// Eight nibbles in ascending columns -> the word of a 4-bit chunk, and back. Each line swaps parts of the word.
// Several words at a time: most of what loading and writing back 4-bit codes does.
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

// A row's bytes of 4-bit codes in the checkpoint: whole words.
inline size_t code4_row_bytes(const Format& format, int k) {
  const size_t words = (k + format.columns_per_word - 1) / format.columns_per_word;
  return words * format.columns_per_word / 2;
}

// A code of 4 bits, and its eight columns from a multiple of eight on in ascending nibbles.
inline uint32_t eight_nibbles_at(const uint8_t* panel, int row, int column) {
  return from_panel_word(read<uint32_t>(panel + column / 8 * size_t{kWordChunk} + row * 4));
}
inline int nibble_at(const uint8_t* panel, int row, int column) {
  return eight_nibbles_at(panel, row, column) >> column % 8 * 4 & 15;
}

}  // namespace kt
