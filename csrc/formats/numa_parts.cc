#include "formats/numa_parts.h"

#include <algorithm>
#include <cstring>

namespace kt {
namespace {

constexpr int kBlockColumns = 3584;
constexpr int kTileRows = 32;
constexpr int kHalfRows = 16;
constexpr int kHalfBytes = 1024;
constexpr int kRowBytes = 64;  // of a row in a tile

uint32_t word_at(const uint8_t* half, int word, int row) {
  uint32_t value;
  std::memcpy(&value, half + word * kRowBytes + row * 4, sizeof(value));
  return value;
}

struct Int8 {
  static constexpr int kBlock = 64;  // rows of a block, columns of a tile

  static void write_row(const uint8_t* half, int row, uint8_t* out) {
    for (int w = 0; w < 16; ++w) {
      const uint32_t word = word_at(half, w, row);
      std::memcpy(out + w * 4, &word, sizeof(word));
    }
  }
};

struct Int4 {
  static constexpr int kBlock = 128;

  // Four nibbles in the low halves of four bytes, side by side.
  static uint16_t side_by_side(uint32_t nibbles) {
    const uint32_t pairs = nibbles | nibbles >> 4;
    return static_cast<uint16_t>((pairs & 0xFF) | (pairs >> 8 & 0xFF00));
  }

  static void write_row(const uint8_t* half, int row, uint8_t* out) {
    for (int w = 0; w < 16; ++w) {
      const uint32_t plus_8 = word_at(half, w, row) ^ 0x88888888u;
      const uint16_t first = side_by_side(plus_8 & 0x0F0F0F0Fu), second = side_by_side(plus_8 >> 4 & 0x0F0F0F0Fu);
      std::memcpy(out + w * 2, &first, sizeof(first));
      std::memcpy(out + kRowBytes / 2 + w * 2, &second, sizeof(second));
    }
  }
};

template <class Codes>
void unpack(const NumaPart& part, uint8_t* out, size_t row_bytes) {
  const uint8_t* half = part.packed;
  for (int block = 0; block < part.rows; block += Codes::kBlock) {
    for (int begin = 0; begin < part.columns; begin += kBlockColumns) {
      const int end = std::min(begin + kBlockColumns, part.columns);
      for (int step = block; step < block + Codes::kBlock; step += kTileRows) {
        for (int column = begin; column < end; column += Codes::kBlock) {
          uint8_t* tile = out + step * row_bytes + static_cast<size_t>(column) * kRowBytes / Codes::kBlock;
          for (int rows = 0; rows < kTileRows; rows += kHalfRows, half += kHalfBytes) {
            for (int r = 0; r < kHalfRows; ++r) Codes::write_row(half, r, tile + (rows + r) * row_bytes);
          }
        }
      }
    }
  }
}

}  // namespace

void unpack_numa_part_int8(const NumaPart& part, uint8_t* out, size_t row_bytes) { unpack<Int8>(part, out, row_bytes); }

void unpack_numa_part_int4(const NumaPart& part, uint8_t* out, size_t row_bytes) { unpack<Int4>(part, out, row_bytes); }

}  // namespace kt
