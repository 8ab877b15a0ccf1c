// Parts of a matrix as the original converter packed them for AMX, put back into rows.
//
// A part [rows, columns], both multiples of 64 (int8) or 128 (int4), is blocks of so many rows; in them blocks of 3584
// columns; in them steps of 32 rows; in them steps of 64 or 128 columns, each a tile of 2048 bytes:
//
//   tile:   16 rows | 16 rows                 each half: 16 x 16 words of 32 bits, [word of the row][row]
//   word:   int8: 4 columns; int4: columns j..j+3 in the low nibbles, 64+j..64+j+3 in the high ones, two's complement
//
// Written: int8 [columns], or code + 8 in 4 bits, an even column (low) and the next one (high) to a byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

struct NumaPart {
  const uint8_t* packed;
  int rows;
  int columns;
};

// Row r goes to `out` + r * `row_bytes`.
void unpack_numa_part_int8(const NumaPart& part, uint8_t* out, size_t row_bytes);
void unpack_numa_part_int4(const NumaPart& part, uint8_t* out, size_t row_bytes);

}  // namespace kt
