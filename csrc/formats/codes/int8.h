// Codes that are signed bytes: whole numbers from -128 to 127.
//
// Checkpoint: row-major [N, K] int8. A panel has k in fours, and each four, a chunk, holds all 32 rows:
//
//   k=0..3: | r0 k0 | r0 k1 | r0 k2 | r0 k3 | r1 k0 | ... | r31 k3 |   128 bytes
//   k=4..7: | r0 k4 | r0 k5 | ...                                  |
//   ...     [K_padded / 4][32][4]
//
// That is the operand order of VPDPBUSD and of an AMX B tile of bytes (16 fours x 64 bytes). Padding: 0.
#pragma once

#include "formats/codes/code_kind.h"

namespace kt {

extern const CodeKind kInt8Codes;

}  // namespace kt
