// A weight format as data: how a checkpoint stores codes and scales, and how panels keep them. Each format's header has
// its row, and formats/codes/ the pictures of its codes; packing, writing back and the slow decode (formats/panel.h)
// read the row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "formats/panel_layout.h"

namespace kt {

struct GgufType;

// Matrices are [rows, k]: k is the dimension that is summed over.
struct MatrixShape {
  int rows;
  int k;
};

// formats/codes/; kCode4Wide: codes of 4 bits whose integers need 8; kBlocks: rows as a GGUF file has them.
enum class CodeType : int { kBf16, kE4m3, kCode4, kInt8, kCode5, kCode6, kCode3, kCode2, kCode4Wide, kBlocks, kF32 };
constexpr int kCodeTypes = 11;

// kRowMajor: [rows][k]. kTransposed: words of 8 codes along k, [k/8][rows], and scales [k/g][rows] (GPTQ).
enum class Order : int { kRowMajor, kTransposed };

// The 16 values of a 4-bit code as bf16, and the code of zero, which fills the padding.
struct CodeTable {
  uint16_t bf16[16];
  int zero_code;
};

constexpr int kWholeRow = -1;     // one scale for all columns
constexpr int kGroupOption = -2;  // the checkpoint's group size decides (FormatOptions)

struct Format {
  const char* name;
  CodeType codes;
  const CodeTable* table;  // 4-bit codes only
  Order order;
  int columns_per_word;   // codes in one stored word; rows of a matrix start at whole words
  int rows_per_scale;     // 0 = no scales
  int columns_per_scale;  // or kWholeRow, kGroupOption
  // How panels keep a scale; kNone = as the checkpoint has it (FormatOptions::scale_dtype).
  ScaleType scale;
  // How scales are written back; kNone = as the panels keep them.
  ScaleType written_scale;
  // The blocks of its matrices in a GGUF file (formats/gguf/gguf_types.h); null = other checkpoints.
  const GgufType* blocks = nullptr;
  int code_offset = 0;  // what stored codes have too much, where there is no table
  // The method that reads it, where that has several formats; null = it has this one, of the same name.
  const char* shared_method = nullptr;
  // The same numbers as the file has them, for what only kernels of such blocks can do; null = there is no such row.
  const Format* as_blocks = nullptr;

  // A checkpoint has scales in a tensor of their own.
  bool scales_apart() const { return rows_per_scale > 0 && blocks == nullptr && codes != CodeType::kBlocks; }
  const char* method() const { return shared_method != nullptr ? shared_method : name; }
};

// What the bytes of a checkpoint leave open.
struct FormatOptions {
  int group_size = 0;  // for kGroupOption; 0 = one scale per row
  DType scale_dtype = DType::kF32;
};

// In the order in which they are listed to users.
const std::vector<const Format*>& all_formats();

// Throws std::invalid_argument naming the formats of the method. (Methods may have formats of the same name: MXFP4.)
const Format& format_of(const std::string& method, const std::string& name);

// Throws std::invalid_argument naming the methods there are.
std::vector<const Format*> formats_of_method(const std::string& method);

}  // namespace kt
