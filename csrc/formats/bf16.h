// BF16 weights.
//
// Checkpoint: row-major [N, K] bf16.
// Packed: panels of 32 output rows; inside a panel, k runs in pairs and each pair holds all 32 rows:
//
//   panel p:  k=0,1: | r0 k0 | r0 k1 | r1 k0 | r1 k1 | ... | r31 k0 | r31 k1 |   128 bytes
//             k=2,3: | r0 k2 | r0 k3 | ...                                   |
//             ...    [K_padded / 2][32][2]
//
// That is the operand order of VDPBF16PS (16 rows x pair per zmm), of an AMX B tile (16 pairs x 64 bytes) and one
// sequential stream. Rows beyond N and columns beyond K are zero; K_padded is a multiple of 32. Exact: no rounding.
#pragma once

#include "formats/format.h"

namespace kt {

constexpr Format kFormatBf16 = {"BF16", CodeType::kBf16, nullptr,          Order::kRowMajor, 1,
                                0,      kWholeRow,       ScaleType::kNone, ScaleType::kNone};

}  // namespace kt
