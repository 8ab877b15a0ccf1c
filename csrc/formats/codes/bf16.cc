#include "formats/codes/bf16.h"

#include "formats/codes/chunks.h"
#include "formats/numbers.h"

namespace kt {
namespace {

uint32_t pack(const Format&, const CodeSource& source, uint8_t* panel) {
  pack_words<uint16_t>(source, panel);
  return 0;
}

void unpack(const Format& format, const uint8_t* panel, const PanelRows& rows, const MatrixPart& part,
            const MatrixTarget& target) {
  unpack_words<uint16_t>(panel, rows, part, target.codes + rows.local * row_bytes(format, part.columns));
}

double value(const Format&, const uint8_t* panel, int row, int column) {
  return from_bf16(read<uint16_t>(code_in_words<uint16_t>(panel, row, column)));
}

}  // namespace

const CodeKind kBf16Codes = {"bf16", 16, pack, unpack, value, nullptr, nullptr};

}  // namespace kt
