#include "formats/codes/int8.h"

#include "formats/codes/dot_words.h"

namespace kt {
namespace {

// A dot is a word.
struct Int8 {
  using Order = Ascending;
  static constexpr int kWords = 8;
  static void join(const Dots& dots, uint32_t (&words)[kWords]) { std::copy(dots, dots + kWords, words); }
  static void split(const uint32_t (&words)[kWords], Dots& dots) { std::copy(words, words + kWords, dots); }
};

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

const CodeKind kInt8Codes = {"int8", 8, pack, unpack, value, put_dots<Int8>, take_dots<Int8>};

}  // namespace kt
