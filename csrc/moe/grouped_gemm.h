// One expert's rows times some panels of it: what every pass over the experts does, whatever the rows are.
//
// A GroupedGemm cuts the rows and K into the kernel's blocks, puts the rows of a block side by side, and picks the
// kernel by the number of rows. It belongs to one operand (one PanelLayout) and holds no memory of its own.
#pragma once

#include <algorithm>
#include <cstring>

#include "moe/engine.h"
#include "moe/routing.h"

namespace kt {

// How a row of a kernel's activations lies in memory: its elements, then (int8) its RowGroups.
class RowFormat {
 public:
  RowFormat(Activation activation, const PanelLayout& layout)
      : element_bytes_(activation == Activation::kInt8   ? 1
                       : activation == Activation::kBf16 ? 2
                                                         : 4),
        sum_k_(activation == Activation::kInt8 ? layout.int8_sum_k : 0) {}

  size_t elements(int k) const { return k * element_bytes_; }
  // Bytes of the RowGroups of `k` columns, which begin at a sum.
  size_t groups(int k) const { return sum_k_ == 0 ? 0 : (k + sum_k_ - 1) / sum_k_ * sizeof(RowGroup); }
  // From one row of `k` columns to the next: a multiple of 64.
  size_t stride(int k) const { return (elements(k) + groups(k) + 63) / 64 * 64 + kPadding; }

 private:
  // Rows of 16 tokens a multiple of 4 KiB apart would fall into the same set of a 48 KiB, 12-way L1.
  static constexpr size_t kPadding = 64;

  size_t element_bytes_;
  int sum_k_;
};

// Kernels for few tokens take up to so many panels at once, each a stream: pieces for them are multiples of it. (Zen 4,
// 2 threads, 2026-11-30, a linear layer of 2048 x 4096 in Q4_K, one token: pieces of 1 panel 59 % of the read
// bandwidth, of 4 90 %; 5120 x 2048: of 3 panels 38-48 %, of 4 86 %.)
constexpr int kFewPanels = 4;

// Rows of activations of a whole call.
struct RowTable {
  const uint8_t* data = nullptr;
  size_t stride = 0;     // bytes
  size_t groups_at = 0;  // of a row's RowGroups, from its start
};

class GroupedGemm {
 public:
  // Some panels of one expert.
  struct Panels {
    const uint8_t* first;
    int count;
    const uint8_t* next;  // GemmArgs::next_panels
  };
  // Row i of an expert is row index[i] of the table, or first + i without an index.
  struct Rows {
    const RowTable& table;
    const int32_t* index;
    int first;
    int count;
  };

  GroupedGemm(const KernelSet& kernels, const PanelLayout& layout)
      : kernels_(kernels), layout_(layout), format_(kernels.activation, layout) {}

  const RowFormat& row_format() const { return format_; }

  // Makes room for experts of up to `rows` rows and pieces of up to `columns` columns.
  void reserve(WorkerScratch& scratch, int rows, size_t columns, int node) const;

  // The product of a block of rows is complete when epilogue(product, stride, first_row, rows) sees it.
  template <class Epilogue>
  void multiply(WorkerScratch& scratch, const Panels& panels, const Rows& rows, Epilogue epilogue) const;

 private:
  struct Block {
    int rows;
    int k;
  };
  // Totals of some tokens at a time stay in L1, where rows a power of two apart would fall into the same sets. (Zen 4,
  // 60 tokens, 512 columns, 2026-11-30: 240 Gop/s, without padding 215.)
  static size_t product_stride(size_t columns) { return columns + kPanelRows; }
  Block block_of(int rows) const;
  void run(const GemmArgs& block) const;
  ActivationRows gathered(WorkerScratch& scratch, const Rows& rows, int first_row, int row_count, int first_k,
                          int k_count) const;

  const KernelSet& kernels_;
  const PanelLayout& layout_;
  RowFormat format_;
};

template <class Epilogue>
void GroupedGemm::multiply(WorkerScratch& scratch, const Panels& panels, const Rows& rows, Epilogue epilogue) const {
  const size_t columns = product_stride(static_cast<size_t>(panels.count) * kPanelRows);
  const Block block = block_of(rows.count);
  float* product = scratch.product.as<float>();
  for (int r = 0; r < rows.count; r += block.rows) {
    const int row_count = std::min(block.rows, rows.count - r);
    for (int k = 0; k < layout_.k_padded; k += block.k) {
      const int k_count = std::min(block.k, layout_.k_padded - k);
      run({&layout_, panels.first, panels.next, panels.count, gathered(scratch, rows, r, row_count, k, k_count),
           row_count, k, k_count, product, columns, k == 0 ? Store::kOverwrite : Store::kAccumulate,
           scratch.kernel.data()});
    }
    epilogue(product, columns, r, row_count);
  }
}

}  // namespace kt
