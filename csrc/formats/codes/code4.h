// Codes of 4 bits: places in a table of 16 values (Format::table).
//
// Checkpoint, row-major: byte b of a row has column 2b in its low nibble and 2b+1 in its high nibble; a row is a whole
// number of words of `columns_per_word` codes. Transposed (GPTQ): int32 [K/8, N], column 8j + i of row n in bits
// 4i..4i+3 of word [j, n]. A chunk of 128 bytes holds 8 columns of a panel, a 32-bit word for each row:
//
//   word r:  bits  0..15 = columns 0 2 4 6      one nibble each, ascending
//            bits 16..31 = columns 1 3 5 7
//
// Shifted right by 4*i, the low nibbles of the two halves of each word are the pair of columns 2i, 2i+1: VPERMW, which
// looks up 16-bit values by the low bits of each half, makes pairs of bf16 of them (AVX512).
//
// Padding: the code of zero.
#pragma once

#include "formats/codes/code_kind.h"

namespace kt {

extern const CodeKind kCode4Codes;

}  // namespace kt
