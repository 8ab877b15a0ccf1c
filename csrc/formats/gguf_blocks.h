// Formats of GGUF types kept as a file has them, CodeType::kBlocks: every type of formats/gguf/ has one. What kernels
// decode while they multiply (kernels/blocks-inl.h), so a panel may as well lie in a mapped file.
//
// A panel is 32 rows, one behind the other; a row is its blocks, ascending, k / (columns of a block) of them:
//
//   row 0:  | block | block | ... |   PanelLayout::block_row_bytes
//   ...
//   row 31: | block | block | ... |   panel_bytes = 32 * block_row_bytes, from the panel's first byte
//
// Packing copies rows; rows that do not exist are zero bytes, which is the number 0 in every type. Columns beyond k do
// not exist here either. Exact: nothing is changed.
#pragma once

#include <vector>

#include "formats/gguf/gguf_types.h"
#include "formats/panel.h"

namespace kt {

// The format of a type's blocks.
const Format& block_format(const GgufType& type);

// Those of all types, in the order of gguf_types().
const std::vector<Format>& block_formats();

// As panel_layout, pack_panel, unpack_panel and element. Written back are bf16 numbers, row-major, rounded to nearest
// even.
PanelLayout block_layout(const Format& format, MatrixShape shape);
void pack_blocks(const PanelLayout& layout, const MatrixSource& source, MatrixShape shape, int index, uint8_t* panel);
void unpack_blocks(const Format& format, const PanelLayout& layout, const uint8_t* panel, int index,
                   const MatrixPart& part, const MatrixTarget& target);
double block_element(const Format& format, const PanelLayout& layout, const uint8_t* panel, int row, int column);

}  // namespace kt
