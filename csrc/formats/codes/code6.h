// Codes of 6 bits: whole numbers from 0 on, or less an offset (Format::code_offset).
//
// Only GGUF files have them, in blocks of their own (formats/gguf/). A chunk of 384 bytes holds 16 columns of a panel,
// three 32-bit words for each row, 128 bytes from one to the next:
//
//   words 0, 1:  the low four bits of 8 columns each, as in code4.h: byte b of dot 2i in the low nibble, of dot 2i+1
//                in the high nibble of byte b of word i
//   word 2:      byte b, bits 2i and 2i+1: the high two bits of byte b of dot i, 0 <= i < 4
//
// Dots are four columns of a row, what a kernel multiplies at once: dots 2i and 2i+1 have columns 8i + (0 4 1 5) and
// 8i + (2 6 3 7). Padding: 0.
#pragma once

#include "formats/codes/code_kind.h"

namespace kt {

extern const CodeKind kCode6Codes;

}  // namespace kt
