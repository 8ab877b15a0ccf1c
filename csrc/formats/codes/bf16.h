// Codes that are bf16 numbers.
//
// Checkpoint: row-major [N, K] bf16. A panel has k in pairs, and each pair, a chunk, holds all 32 rows:
//
//   k=0,1: | r0 k0 | r0 k1 | r1 k0 | r1 k1 | ... | r31 k0 | r31 k1 |   128 bytes
//   k=2,3: | r0 k2 | r0 k3 | ...                                   |
//   ...    [K_padded / 2][32][2]
//
// That is the operand order of VDPBF16PS (16 rows x pair per zmm), of an AMX B tile (16 pairs x 64 bytes) and one
// sequential stream. Padding: 0. Kernels decode a NaN as it is.
#pragma once

#include "formats/codes/code_kind.h"

namespace kt {

extern const CodeKind kBf16Codes;

}  // namespace kt
