// Rows of a GGUF file as plain numbers, for layers that are not experts and for tests.
#pragma once

#include <cstdint>

#include "formats/panel_layout.h"

namespace kt {

// The next `rows` rows of `columns` columns each, whole blocks of the type.
struct GgufRows {
  int type;  // ggml's number; one of gguf_types()
  const uint8_t* blocks;
  int64_t rows;
  int64_t columns;
};

// The numbers, row-major, exact in fp32 as gguf.quants.dequantize gives them, and rounded to nearest even in bf16 and
// fp16.
void decode_gguf_rows_avx2(const GgufRows& rows, void* numbers, DType dtype);

}  // namespace kt
