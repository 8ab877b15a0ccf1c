// Codes that are fp32 numbers.
//
// Checkpoint: row-major [N, K] fp32. A panel has one column after the other, and each column holds all 32 rows:
//
//   k=0: | r0 | r1 | ... | r31 |   128 bytes
//   k=1: | r0 | r1 | ... | r31 |
//   ...  [K_padded][32]
//
// Padding: 0. Kernels decode a NaN as it is.
#pragma once

#include "formats/codes/code_kind.h"

namespace kt {

extern const CodeKind kF32Codes;

}  // namespace kt
