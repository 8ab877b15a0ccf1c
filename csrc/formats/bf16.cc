#include "formats/bf16.h"

#include <algorithm>
#include <cstring>

namespace kt::bf16 {

void pack_panel(const uint16_t* weights, int rows, int k, int first_row, int k_padded, uint8_t* panel) {
  constexpr int kRows = 32;
  constexpr int kBlockPairs = 16;  // one cache line of each source row at a time
  const int live_rows = std::clamp(rows - first_row, 0, kRows);
  const uint16_t* source = weights + static_cast<size_t>(first_row) * k;
  const int pairs = k / 2;
  uint32_t* out = reinterpret_cast<uint32_t*>(panel);
  for (int begin = 0; begin < pairs; begin += kBlockPairs) {
    const int end = std::min(begin + kBlockPairs, pairs);
    for (int r = 0; r < live_rows; ++r) {
      const uint8_t* row = reinterpret_cast<const uint8_t*>(source + static_cast<size_t>(r) * k);
      for (int p = begin; p < end; ++p) std::memcpy(&out[p * kRows + r], row + 4 * static_cast<size_t>(p), 4);
    }
    if (live_rows == kRows) continue;
    for (int p = begin; p < end; ++p) {
      std::memset(&out[p * kRows + live_rows], 0, sizeof(uint32_t) * (kRows - live_rows));
    }
  }
  std::memset(out + static_cast<size_t>(pairs) * kRows, 0, panel_bytes(k_padded) - sizeof(uint32_t) * kRows * pairs);
  if (k % 2 != 0) {
    for (int r = 0; r < live_rows; ++r) out[pairs * kRows + r] = source[static_cast<size_t>(r) * k + k - 1];
  }
}

uint16_t element(const uint8_t* panel, int row, int column) {
  uint16_t value;
  std::memcpy(&value, panel + 2 * (static_cast<size_t>(column / 2) * 64 + row * 2 + column % 2), sizeof(value));
  return value;
}

}  // namespace kt::bf16
