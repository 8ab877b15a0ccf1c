// A type of codes: how its codes stand in a checkpoint and in a panel. One record for each type, in the file of its
// name beside this one, with the picture of its chunks; nothing else in formats/ asks which type it has before it.
#pragma once

#include "formats/panel.h"

namespace kt {

// The rows of a panel that a part of a matrix wants.
struct PanelRows {
  int begin;
  int end;
  int local;  // the first one's place in the part
};

// Rows [32 * index, +32) of a matrix in checkpoint order.
struct CodeSource {
  const uint8_t* codes;
  MatrixShape shape;
  int index;
  int rows;  // that exist, up to 32
};

struct CodeKind {
  const char* name;
  int bits;  // of a code, in a checkpoint as in a panel
  // Writes the codes that exist; padding is there already. Returns the rows with a NaN that kernels do not decode. Null
  // for codes that no checkpoint stores one after the other, as is `unpack`.
  uint32_t (*pack)(const Format&, const CodeSource&, uint8_t* panel);
  // Codes of `rows` and the part's columns, in checkpoint order.
  void (*unpack)(const Format&, const uint8_t* panel, const PanelRows& rows, const MatrixPart&, const MatrixTarget&);
  // The exact number a code means, without its scale.
  double (*value)(const Format&, const uint8_t* panel, int row, int column);
  // Plain codes, one byte each, of one row to and from a panel: `column` and `count` are multiples of 32. Null for
  // codes that no format keeps so (dot_words.h).
  void (*put)(uint8_t* panel, int row, int column, const uint8_t* codes, int count);
  void (*take)(const uint8_t* panel, int row, int column, uint8_t* codes, int count);
};

const CodeKind& code_kind(CodeType type);

// Bytes of a row of `columns` codes in a row-major checkpoint: whole words.
size_t row_bytes(const Format& format, int columns);

}  // namespace kt
