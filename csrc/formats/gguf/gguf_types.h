// The ggml types that are known here, as data: one row for each definition of block_types-inl.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "formats/gguf/blocks.h"

namespace kt {

struct GgufType {
  const char* name;
  int id;       // ggml's number
  int columns;  // of a block
  int bytes;    // of a block
  int group;    // columns that share a scale and a low; 0 for plain numbers
  bool lows;    // numbers have a low beside their scale
  // Types that panels of integers hold; code = stored - offset, or table[stored]. Null functions and tables elsewhere.
  void (*parts)(const uint8_t* block, BlockParts& parts);
  int offset;
  const int8_t* table;
  // The numbers of `count` columns, whole blocks, as gguf.quants.dequantize gives them.
  void (*numbers)(const uint8_t* blocks, int64_t count, float* numbers);

  size_t row_bytes(int64_t columns_of_row) const { return static_cast<size_t>(columns_of_row / columns * bytes); }
};

// In the order of ids.
const std::vector<GgufType>& gguf_types();

// Throws std::invalid_argument for an id that is not in the table.
const GgufType& gguf_type(int id);

}  // namespace kt
