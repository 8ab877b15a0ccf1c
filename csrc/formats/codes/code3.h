// Codes of 3 bits: whole numbers from 0 on, or less an offset (Format::code_offset).
//
// Only GGUF files have them, in blocks of their own (formats/gguf/). A chunk of 384 bytes holds 32 columns of a panel,
// three 32-bit words for each row, 128 bytes from one to the next:
//
//   words 0, 1:  byte b, bits 2i and 2i+1: the low two bits of byte b of dot i (word 0), 4 + i (word 1), 0 <= i < 4
//   word 2:      byte b, bit i: the third bit of byte b of dot i, 0 <= i < 8
//
// Dots are four columns of a row, what a kernel multiplies at once: dot i has columns 4i .. 4i+3. Padding: 0.
#pragma once

#include "formats/codes/code_kind.h"

namespace kt {

extern const CodeKind kCode3Codes;

}  // namespace kt
