// Codes that stay in the blocks of a GGUF file, beside their scales: formats/gguf_blocks.h packs, writes back and reads
// them, as bf16 numbers.
#pragma once

#include "formats/codes/code_kind.h"

namespace kt {

extern const CodeKind kBlockCodes;

}  // namespace kt
