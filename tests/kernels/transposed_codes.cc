// Every code at every place of a tile, turned around, against a plain loop over the layouts that formats/codes/int8.h
// and code4.h picture. Returns 1 and says where, if a byte differs, or one beyond the tile was written.
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels/transpose_codes.h"

namespace {

constexpr int kRows = kt::kPanelRows;
constexpr uint8_t kUntouched = 0xA5;

uint32_t state = 1;
uint8_t random_byte() { return static_cast<uint8_t>((state = state * 1664525u + 1013904223u) >> 24); }

int int8_at(const kt::PanelLayout&, const uint8_t* from, int row, int column) {
  return static_cast<int8_t>(from[column / 4 * 128 + row * 4 + column % 4]);
}

// A word a row for each eight columns: even columns in its lower half, ascending, odd ones in its upper.
int code4_at(const kt::PanelLayout& layout, const uint8_t* from, int row, int column) {
  uint32_t word;
  std::memcpy(&word, from + column / 8 * 128 + row * 4, sizeof(word));
  const int place = column % 8;
  const uint32_t code = word >> (place % 2 * 16 + place / 2 * 4) & 15;
  return layout.integers[code] - layout.integer_offset;
}

bool same(const char* name, kt::TransposeCodesFn turn, int (*at)(const kt::PanelLayout&, const uint8_t*, int, int),
          const kt::PanelLayout& layout) {
  for (int round = 0; round < 100; ++round) {
    std::vector<uint8_t> from(kRows * kRows), to(kt::kTransposedTileBytes + 64, kUntouched);
    for (uint8_t& byte : from) byte = random_byte();
    turn(layout, from.data(), to.data());
    for (int row = 0; row < kRows; ++row) {
      for (int column = 0; column < kRows; ++column) {
        const int found = static_cast<int8_t>(to[row / 4 * 128 + column * 4 + row % 4]);
        const int expected = at(layout, from.data(), row, column);
        if (found == expected) continue;
        std::fprintf(stderr, "%s: row %d column %d is %d, expected %d\n", name, row, column, found, expected);
        return false;
      }
    }
    for (size_t i = kt::kTransposedTileBytes; i < to.size(); ++i) {
      if (to[i] == kUntouched) continue;
      std::fprintf(stderr, "%s: wrote byte %zu\n", name, i);
      return false;
    }
  }
  return true;
}

kt::PanelLayout with_table(const int (&values)[16], int offset) {
  kt::PanelLayout layout{};
  for (int code = 0; code < 16; ++code) layout.integers[code] = static_cast<uint8_t>(values[code] + offset);
  layout.integer_offset = offset;
  return layout;
}

}  // namespace

int main() {
  const int offset_binary[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  const int e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const bool right = same("int8", kt::kTransposeCodes.int8, int8_at, {}) &&
                     same("int4", kt::kTransposeCodes.code4, code4_at, with_table(offset_binary, 8)) &&
                     same("e2m1", kt::kTransposeCodes.code4, code4_at, with_table(e2m1, 12));
  return right ? 0 : 1;
}
