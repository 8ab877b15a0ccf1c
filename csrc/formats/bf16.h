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

#include <cstddef>
#include <cstdint>

namespace kt::bf16 {

// Bytes of one panel for `k_padded` columns.
constexpr size_t panel_bytes(int k_padded) { return static_cast<size_t>(k_padded) * 32 * 2; }

// Packs rows [first_row, first_row + 32) of a row-major [rows, k] matrix into `panel`.
void pack_panel(const uint16_t* weights, int rows, int k, int first_row, int k_padded, uint8_t* panel);

// The inverse, the slow reference: element (row of the panel, column).
uint16_t element(const uint8_t* panel, int row, int column);

}  // namespace kt::bf16
