// Codes of a panel turned around: 32 rows x 32 columns of a panel of integers become 32 columns x 32 rows of a panel of
// signed bytes (formats/codes/int8.h). Exact. Used on every CPU (kernels/avx2/transpose_codes.cc); plain functions only
// (see kernel_set.h).
#pragma once

#include "formats/panel_layout.h"

namespace kt {

constexpr size_t kTransposedTileBytes = size_t{kPanelRows} * kPanelRows;

// `from`: the chunks of 32 columns; `to`: kTransposedTileBytes. Any alignment.
using TransposeCodesFn = void (*)(const PanelLayout& layout, const uint8_t* from, uint8_t* to);

struct TransposeCodes {
  TransposeCodesFn int8;
  // Codes become what the table's integers are without their offset, within +-12.
  TransposeCodesFn code4;
};

extern const TransposeCodes kTransposeCodes;

}  // namespace kt
