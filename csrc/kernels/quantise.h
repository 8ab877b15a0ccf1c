// Rows of numbers to symmetric 8-bit or 4-bit integers, as the converter writes them (doc/converting.md).
//
//     numbers     [rows, columns] bf16, fp16, fp32, or float8_e4m3fn times a scale per block
//     scale       of each group of columns: absmax / 127 or absmax / 7, fp32; 0 for a group of zeros
//     code        round half to even (number / scale), the division in fp32, so within ±127 or ±7
//     int8        one byte a code
//     int4        code + 8 in four bits; a byte holds an even column (low) and the next one (high)
//
// Plain structs and functions only: included by files built with -m flags.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kt {

enum class NumberType : int { kBf16, kF16, kF32, kE4m3 };

enum class IntegerCodes : int { kInt8, kInt4 };

constexpr int64_t kQuantiseStep = 32;  // columns quantised together; groups are multiples of it, or whole rows

// float8 only: number (r, c) is its code times scales[(first_row + r) / block_rows][c / block_columns], fp32 and
// rounded once. `block_columns` is a multiple of 8, or at least the number of columns.
struct BlockScales {
  const float* scales;  // null = none
  int64_t first_row;
  int64_t block_rows;
  int64_t block_columns;
  int64_t per_row;  // scales in one row of blocks
};

struct QuantiseArgs {
  NumberType type;
  const uint8_t* numbers;
  size_t row_bytes;  // from one row to the next
  int64_t rows;
  int64_t columns;  // even for int4
  int64_t group;    // divides `columns`
  BlockScales blocks;
  IntegerCodes codes;
  uint8_t* code_bytes;  // rows packed without gaps
  float* code_scales;   // [rows, columns / group]
  float* row;           // scratch: `columns` rounded up to kQuantiseStep
};

// The first row with an infinite or NaN number, where it stopped; -1 if there is none.
int64_t quantise_rows_avx2(const QuantiseArgs& args);

}  // namespace kt
