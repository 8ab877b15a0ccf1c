#include "formats/codes/f32.h"

#include "formats/codes/chunks.h"

namespace kt {
namespace {

uint32_t pack(const Format&, const CodeSource& source, uint8_t* panel) {
  pack_words<float>(source, panel);
  return 0;
}

void unpack(const Format& format, const uint8_t* panel, const PanelRows& rows, const MatrixPart& part,
            const MatrixTarget& target) {
  unpack_words<float>(panel, rows, part, target.codes + rows.local * row_bytes(format, part.columns));
}

double value(const Format&, const uint8_t* panel, int row, int column) {
  return read<float>(code_in_words<float>(panel, row, column));
}

}  // namespace

const CodeKind kF32Codes = {"f32", 32, pack, unpack, value, nullptr, nullptr};

}  // namespace kt
