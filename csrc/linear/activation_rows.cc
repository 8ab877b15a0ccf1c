#include "linear/activation_rows.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace kt {
namespace {

// A piece for few tokens is some streams long enough for the prefetchers, and there are enough of them to share evenly.
constexpr size_t kPieceBytes = size_t{128} << 10;
constexpr int kPiecesPerThread = 4;
constexpr int kManyTokens = 32;

}  // namespace

DType row_dtype(ElementType type) {
  switch (type) {
    case ElementType::kBf16:
      return DType::kBf16;
    case ElementType::kF16:
      return DType::kF16;
    case ElementType::kF32:
      return DType::kF32;
    default:
      throw std::invalid_argument(std::string("rows of a layer are ") + name_of(type) +
                                  " numbers; expected bfloat16, float16 or float32");
  }
}

void RowConversion::operator()(const uint8_t* from, uint8_t* wide, uint8_t* to) const {
  const size_t element = kernels.rows->activation == Activation::kBf16 ? 2 : 4;
  uint8_t* const row = prepares() ? wide : to;
  load(from, row, k);
  std::memset(row + k * element, 0, (layout.k_padded - k) * element);
  if (prepares()) kernels.prepare_row({&layout, reinterpret_cast<const float*>(row), to, to + groups_at});
}

bool serve_unconverted(const MatrixView& x, const KernelSet& kernels, const PanelLayout& layout) {
  if (kernels.prepare_row != nullptr || static_cast<int>(row_dtype(x.type)) != kernels.rows->unconverted) return false;
  if (x.columns != layout.k_padded || reinterpret_cast<uintptr_t>(x.data) % 64 != 0) return false;
  return x.rows == 1 || (x.row_bytes % 64 == 0 && x.row_bytes > 0);
}

int panels_per_piece(int panels, size_t panel_bytes, int64_t tokens, int threads) {
  const int even = panels / (kPiecesPerThread * threads);
  const int stream = std::max(kFewPanels, static_cast<int>(kPieceBytes / panel_bytes) / kFewPanels * kFewPanels);
  return std::max(1, std::min({even, kMostPanelsPerPiece, tokens >= kManyTokens ? kMostPanelsPerPiece : stream}));
}

}  // namespace kt
