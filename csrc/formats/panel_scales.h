// Scales between checkpoint order, [rows][groups] or transposed, and a panel's records, [group][32 rows].
#pragma once

#include "formats/panel.h"

namespace kt {

void pack_scales(const Format& format, const PanelLayout& layout, const FormatOptions& options,
                 const MatrixSource& source, MatrixShape shape, int index, uint8_t* panel);
void unpack_scales(const Format& format, const PanelLayout& layout, const uint8_t* panel, int index,
                   const MatrixPart& part, const MatrixTarget& target);
double scale_value(const PanelLayout& layout, const uint8_t* panel, int row, int column);

// Columns that share a record, and its bytes, where it holds `groups` groups.
int record_columns(ScaleType type, int group_k);
size_t record_bytes(ScaleType type, int groups);

// One scale, of types whose records hold one for each row.
size_t scale_bytes(ScaleType type);
ScaleType as_scale_type(DType dtype);

}  // namespace kt
