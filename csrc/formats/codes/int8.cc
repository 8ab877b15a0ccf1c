#include "formats/codes/int8.h"

#include "formats/codes/chunks.h"

namespace kt {
namespace {

uint32_t pack(const Format&, const CodeSource& source, uint8_t* panel) {
  pack_words<int8_t>(source, panel);
  return 0;
}

void unpack(const Format& format, const uint8_t* panel, const PanelRows& rows, const MatrixPart& part,
            const MatrixTarget& target) {
  unpack_words<int8_t>(panel, rows, part, target.codes + rows.local * row_bytes(format, part.columns));
}

double value(const Format&, const uint8_t* panel, int row, int column) {
  return read<int8_t>(code_in_words<int8_t>(panel, row, column));
}

}  // namespace

const CodeKind kInt8Codes = {"int8", 8, pack, unpack, value};

}  // namespace kt
