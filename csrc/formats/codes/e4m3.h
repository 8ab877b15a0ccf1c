// Codes of float8_e4m3fn (OCP 8-bit floating point, 2023: s eeee mmm, bias 7, no infinities, s1111111 is NaN).
//
// Checkpoint: row-major [N, K] bytes. A chunk of 64 bytes holds 2 columns of a panel, eight rows at a time:
//
//   bytes 16*l ..  =  | rows 8*l .. 8*l+7, column 0 | the same rows, column 1 |      l < 4
//
//   panel:  | chunk k=0,1 | chunk k=2,3 | ...
//
// Unpacking such a chunk to 16 bits gives, per column, eight rows to a 128-bit lane, which is what the conversion from
// IEEE half takes (AVX2, AVX512); with VBMI one byte permutation makes pairs of columns of it.
//
// Padding: 0. Kernels need not decode NaN: rows that have one are named in the panel's header.
#pragma once

#include "formats/codes/code_kind.h"

namespace kt {

extern const CodeKind kE4m3Codes;

}  // namespace kt
