// What a block of a ggml type says: block_types-inl.h reads it.
#pragma once

#include <stdint.h>

namespace kt {

constexpr int kLargestBlock = 256;       // columns of a block
constexpr int kSmallestBlockGroup = 16;  // columns that share a scale
constexpr int kLargestBlockGroups = kLargestBlock / kSmallestBlockGroup;

// A block as a file stores it, for types that are repacked into panels: the scale of a group is d * sc, its low
// -dmin * m; where groups are whole blocks, sc is 1 and the low is +dmin (Q4_1, Q5_1).
struct BlockScales {
  uint16_t d;     // fp16; MXFP4: the exponent's byte
  uint16_t dmin;  // fp16
  int8_t sc[kLargestBlockGroups];
  uint8_t m[kLargestBlockGroups];
};

struct BlockParts : BlockScales {
  uint8_t codes[kLargestBlock];  // as stored, before an offset is taken off or a table looked up; Q8_0: int8
};

}  // namespace kt
