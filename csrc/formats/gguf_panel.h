// Panels of a matrix that a GGUF file stores in blocks, codes and scales together (formats/gguf/): taken apart on the
// way in, and put together as numbers on the way out. Every block is so many columns of one row; blocks follow each
// other, [rows][k / columns of a block].
//
// Value of a number: scale * code + low, both of its group of columns. Records of scales (ScaleType) keep what the
// blocks have, two-level scales as two levels:
//
//   kF16         group: 32 fp16 d                                              scale = d
//   kF16Min      group: 32 fp16 d | 32 fp16 m                                  scale = d,      low = m
//   kE8m0        group: 32 bytes b                                             scale = 2^(b-127)
//   kSuper       256 columns: 32 fp16 d | per group 32 int8 s                  scale = d * s
//   kSuperMin    256 columns: 32 fp16 d | 32 fp16 e | per group 32 s, 32 m     scale = d * s,  low = -e * m
//   kSuperMin4   256 columns: 32 fp16 d | 32 fp16 e | per group 32 s + 16 m    scale = d * s,  low = -e * m
#pragma once

#include "formats/panel.h"

namespace kt {

// As pack_panel, unpack_panel and element. Written back are bf16 numbers, row-major, rounded to nearest even from
// scale * code + low in fp32.
void pack_gguf_panel(const Format& format, const PanelLayout& layout, const MatrixSource& source, MatrixShape shape,
                     int index, uint8_t* panel);
void unpack_gguf_panel(const Format& format, const PanelLayout& layout, const uint8_t* panel, int index,
                       const MatrixPart& part, const MatrixTarget& target);
double gguf_element(const Format& format, const PanelLayout& layout, const uint8_t* panel, int row, int column);

}  // namespace kt
