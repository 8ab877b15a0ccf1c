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
  // As many panels as a strip should have at most; its cut does not change a result.
  int strip_panels() const { return unpacks() ? 2 * kStripPanels : kStripPanels; }
  static constexpr int kMostStripPanels = 8;

  void reserve(WorkerScratch& scratch, int rows, int node) const;
  // sums [rows.count][strip.columns()], one after the other. The table's rows have depth() elements.
  void multiply(WorkerScratch& scratch, int expert, const Strip& strip, const GroupedGemm::Rows& rows, Store store,
                float* sums) const;

 private:
  // A block of 128 columns is 128 KiB, which with its activations and its products stays in L2.
  static constexpr int kBlockRows = 512;
  static constexpr int kStripPanels = 4;

  // Whether panels are decoded by way of rows in checkpoint order.
  bool unpacks() const;
  int block_panels(int first) const { return std::min(kBlockRows / kPanelRows, panels_ - first); }
  const uint8_t* panel(int expert, int index) const;
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
