// Rows times a matrix of an expert, where forward multiplies by its transpose: sums[row, k] = sum over n of
// A[row, n] W[n, k], from the panels that forward reads.
//
// Blocks of kBlockRows rows and a strip of columns of W are decoded, transposed and laid out as bf16 panels in the
// worker's scratch, where the bf16 kernels of this CPU multiply them; no other copy of the weights exists. bf16 codes
// stay exact; the product of a code and its scale is rounded once, to bf16 (a relative error of 2^-9 at most).
//
//   panel of W, 32 rows n:   | columns k ...             |        panel of the scratch, 32 columns k:  | rows n ... |
#pragma once

#include "kernels/training.h"
#include "moe/grouped_gemm.h"
#include "moe/weights.h"

namespace kt {

// Panel `index` of a whole matrix, whatever sub-pool has it.
const uint8_t* panel_of(const ExpertWeights& weights, Projection which, int expert, int index);

class TransposedGemm {
 public:
  // Panels of 32 columns of W.
  struct Strip {
    int first;
    int panels;
    int columns() const { return panels * kPanelRows; }
  };

  TransposedGemm(const ExpertWeights& weights, Projection which);

  // Elements of A.
  const KernelSet& kernels() const { return kernels_; }
  // Columns of A, padded to whole panels: rows of W.
  int depth() const { return panels_ * kPanelRows; }
  int column_panels() const { return weights_.layout(which_).k_padded / kPanelRows; }
  // As many panels as a strip has at most; its cut does not change a result. GGUF types have blocks of as many columns.
  static constexpr int kMostStripPanels = 8;

  void reserve(WorkerScratch& scratch, int rows, int node) const;
  // sums [rows.count][strip.columns()], one after the other. The table's rows have depth() elements.
  void multiply(WorkerScratch& scratch, int expert, const Strip& strip, const GroupedGemm::Rows& rows, Store store,
                float* sums) const;

 private:
  // A block of 8 panels is 256 KiB, which with its activations and its products stays in L2. (Zen 4, 1 thread, shape S,
  // 1024 tokens, rank 8, 2026-11-30, CPU time of forward and backward, BF16 / AMXINT4, busy machine: 512 rows and 8
  // panels 1025 / 1078 ms, 4 panels 1092 / 1162, fetching the next panel ahead 1101 / 1175; 256 rows and 4 panels 1132
  // / 1197, 1024 rows and 4 panels 1136 / 1043.)
  static constexpr int kBlockRows = 512;

  // Whether panels are decoded by way of rows in checkpoint order.
  bool unpacks() const;
  int block_panels(int first) const { return std::min(kBlockRows / kPanelRows, panels_ - first); }
  void decode(int expert, int first, int count, const Strip& strip, WorkerScratch& scratch, uint8_t* to) const;
  void decode_panel(int expert, int index, const Strip& strip, uint8_t* room, uint8_t* to, size_t distance) const;
  void spread_nan(const uint8_t* panel, const Strip& strip, uint8_t* to, size_t distance) const;

  const ExpertWeights& weights_;
  Projection which_;
  const KernelSet& kernels_;
  const DecodeKernels& decoders_;
  int panels_;             // of W
  PanelLayout layout_;     // of a block
  PanelLayout remainder_;  // of the last block
};

}  // namespace kt
