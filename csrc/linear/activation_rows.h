// What the passes over linear layers share: tokens as the kernels multiply them, and how panels are cut into pieces.
#pragma once

#include "linear/linear.h"

namespace kt {

// Throws std::invalid_argument for others than bfloat16, float16 and float32.
DType row_dtype(ElementType type);

// A row of `k` numbers as the kernels multiply it: layout.k_padded elements, and int8 RowGroups at `groups_at`.
struct RowConversion {
  const KernelSet& kernels;
  const PanelLayout& layout;
  ConvertFn load;
  int k;
  size_t groups_at;

  bool prepares() const { return kernels.prepare_row != nullptr; }
  // `wide`: room for k_padded floats where it prepares.
  void operator()(const uint8_t* from, uint8_t* wide, uint8_t* to) const;
};

constexpr int kTokensPerConversion = 16;

// Whether kernels multiply these rows as they are: of their elements' type, each a multiple of 64 bytes from the first.
bool serve_unconverted(const MatrixView& x, const KernelSet& kernels, const PanelLayout& layout);

// How many of `panels` a piece of work for `tokens` tokens has.
constexpr int kMostPanelsPerPiece = 16;  // as many as the eight gate and up pairs of experts
int panels_per_piece(int panels, size_t panel_bytes, int64_t tokens, int threads);

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace kt
