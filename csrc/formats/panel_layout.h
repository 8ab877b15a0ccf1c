// How a weight matrix lies in memory once it is packed: plain structs that kernels read, so this header, like
// kernels/kernel_set.h, defines nothing the linker could merge.
//
// A matrix [N, K] is stored as ceil(N/32) panels of 32 output rows; every format says in its header (formats/*.h) how
// the bytes of a panel run. K is padded to kPanelK with zeros.
//
//   | codes: chunks, ascending k | PanelHeader | scales: one record per group of k, for all 32 rows |
//
// (a format without scales has the codes only)
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kt {

constexpr int kPanelRows = 32;  // two AMX B tiles, two zmm of 16 output rows
constexpr int kPanelK = 32;     // one AMX tile of 32 bf16 columns

enum class DType : int { kBf16 = 0, kF16 = 1, kF32 = 2 };

// What a group's record of scales holds.
enum class ScaleType : int {
  kNone,    // no scales
  kScalar,  // one fp32 for the whole panel
  kF32,     // 32 fp32
  kBf16,    // 32 bf16
  kF16,     // 32 IEEE half
  kE8m0,    // 32 bytes: 2^(b-127)
  kE4m3,    // 32 bytes of float8_e4m3fn, to be multiplied by PanelHeader::factor
  // Of GGUF types, value = scale * code + low; two levels are kept as two levels (formats/gguf_panel.h).
  kF16Min,     // 32 IEEE half d, 32 m: scale = d, low = m
  kSuper,      // of kSuperK columns: 32 IEEE half d, then per group 32 int8 s: scale = d * s
  kSuperMin,   // 32 IEEE half d, 32 e, then per group 32 bytes s, 32 m: scale = d * s, low = -e * m
  kSuperMin4,  // the same with s and m as the low and high nibble of 32 bytes
};
constexpr int kSuperK = 256;

// Stands between the codes and the scales, in 64 bytes.
struct PanelHeader {
  float factor;
  uint32_t
      nan_rows;  // bit r: row r has an e4m3 code or scale that is NaN: its outputs are (kernels need not decode NaN)
};
constexpr size_t kPanelHeaderBytes = 64;

constexpr int kLargestStepK = 128;  // columns summed before a scale is applied
constexpr int kSmallestStepK = 16;
// Columns that share a scale of int8 activations: what an AMX tile takes at once.
constexpr int kLargestInt8StepK = 64;
// What is added to signed bytes where instructions want bytes without a sign.
constexpr int kSignedOffset = 128;

// How the panels of one matrix are laid out. `header_offset` is a multiple of 64, like `panel_bytes`.
struct PanelLayout {
  size_t panel_bytes;
  size_t bytes_per_32k;  // code bytes of 32 columns
  size_t header_offset;  // from the start of the panel
  size_t scale_stride;   // bytes of one record
  ScaleType scale_type;
  int k_padded;
  int group_k;         // columns that share a scale
  int record_k;        // columns that share a record: a group, or a few
  int step_k;          // columns of one step: divides group_k, unless one group covers all of K
  uint16_t table[16];  // 4-bit codes: the bf16 value of each
  // For int8 activations: columns that share an activation scale, columns of those whose products are summed as
  // integers (they share a record too), and 4-bit codes as integers, value = integer_factor * (integers[code] -
  // integer_offset).
  int int8_step_k;
  int int8_sum_k;
  uint8_t integers[16];
  int integer_offset;
  float integer_factor;
  // Rows of a GGUF file as they are (CodeType::kBlocks): ggml's number of the type, the bytes of a row, whose k columns
  // (not k_padded) are blocks of so many columns and bytes. A panel may stand at any address.
  int block_type;
  size_t block_row_bytes;
  int k;
  int block_k;
  size_t block_bytes;
};

}  // namespace kt
