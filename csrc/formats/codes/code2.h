// Codes of 2 bits: whole numbers from 0 on, or less an offset (Format::code_offset).
//
// Only GGUF files have them, in blocks of their own (formats/gguf/). A chunk of 128 bytes holds 16 columns of a panel,
// a 32-bit word for each row:
//
//   byte b, bits 2i and 2i+1: byte b of dot i, 0 <= i < 4
//
// Dots are four columns of a row, what a kernel multiplies at once: dot i has columns 4i .. 4i+3. Padding: 0.
#pragma once

#include "formats/codes/code_kind.h"

namespace kt {

extern const CodeKind kCode2Codes;

}  // namespace kt
