// Codes between checkpoint order and panel order (the pictures are in bf16.h, e4m3.h and code4.h).
#pragma once

#include "formats/panel.h"

namespace kt {

void pack_codes(const Format& format, const PanelLayout& layout, const uint8_t* codes, MatrixShape shape, int index,
                uint8_t* panel);
void unpack_codes(const Format& format, const uint8_t* panel, int index, const MatrixPart& part,
                  const MatrixTarget& target);
double code_value(const Format& format, const uint8_t* panel, int row, int column);

}  // namespace kt
