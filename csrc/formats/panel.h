// Panels of any format: layout, packing, writing back, and the slow reference decode.
#pragma once

#include "formats/format.h"

namespace kt {

// One matrix as its checkpoint stores it; `scales` is null where the format has none.
struct MatrixSource {
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  float factor = 1;             // NVFP4
  const float* bias = nullptr;  // what is added to each row's product, one number a row; null = nothing
};

// A part of a matrix, and where it is written in checkpoint layout: the first bytes are the part's first element.
struct MatrixPart {
  int row;
  int rows;
  int column;
  int columns;
};
struct MatrixTarget {
  uint8_t* codes;
  uint8_t* scales;
  int row_length;  // Order::kTransposed: words from one row of words to the next
};

// Throws std::invalid_argument, one sentence, when a matrix of this shape cannot be stored.
PanelLayout panel_layout(const Format& format, MatrixShape shape, const FormatOptions& options);

// Packs rows [32 * index, +32) of a matrix. Throws std::invalid_argument for an e8m0 scale of 255 (NaN).
void pack_panel(const Format& format, const PanelLayout& layout, const FormatOptions& options,
                const MatrixSource& source, MatrixShape shape, int index, uint8_t* panel);

// The exact value of (row of the panel, column) as the kernels understand it, from the format's definition.
double element(const Format& format, const PanelLayout& layout, const uint8_t* panel, int row, int column);

// Throws std::invalid_argument when `parts` equal parts of `whole` rows or columns would cut a scale or a word.
void check_split(const Format& format, const PanelLayout& layout, MatrixShape shape, int row_parts, int column_parts);

// Bytes that a part takes in checkpoint layout, codes and scales as they are written.
size_t written_code_bytes(const Format& format, const MatrixPart& part);
size_t written_scale_bytes(const Format& format, const PanelLayout& layout, const MatrixPart& part);

// The inverse of pack_panel for the rows of `part` that lie in panel `index`.
void unpack_panel(const Format& format, const PanelLayout& layout, const uint8_t* panel, int index,
                  const MatrixPart& part, const MatrixTarget& target);

}  // namespace kt
