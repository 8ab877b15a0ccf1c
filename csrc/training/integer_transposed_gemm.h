// What TransposedGemm computes, by int8 kernels, of weights that are integers with one scale a row:
//
//   sums[row, k] = sum over n of (A[row, n] s[n]) q[n, k]
//
// Scales go to the rows that are multiplied, so nothing of the weights is rounded: their codes are turned around as
// they are (kernels/transpose_codes.h) into panels in the worker's scratch. Rows A s are rounded to int8, with a scale
// for every 64 columns, as inference rounds activations. Matrices with the same columns may be stacked: their rows n
// stand one after the other, and their products are one sum.
#pragma once

#include <vector>

#include "kernels/transpose_codes.h"
#include "training/transposed_gemm.h"

namespace kt {

class IntegerTransposedGemm {
 public:
  using Strip = TransposedGemm::Strip;

  // Whether the matrix has such weights.
  static bool serves(const ExpertWeights& weights, Projection which);

  IntegerTransposedGemm(const ExpertWeights& weights, std::vector<Projection> stack);
  IntegerTransposedGemm(const IntegerTransposedGemm&) = delete;
  IntegerTransposedGemm& operator=(const IntegerTransposedGemm&) = delete;

  // Panels of 32 columns of W, and how many of them a strip has at most: an even number.
  int column_panels() const { return weights_.layout(stack_[0]).k_padded / kPanelRows; }
  int strip_panels() const { return strip_panels_; }
  size_t row_stride() const { return gemm_.row_format().stride(layout_.k_padded); }
  RowTable table(const Buffer& rows) const {
    return {rows.data(), row_stride(), gemm_.row_format().elements(layout_.k_padded)};
  }

  // Scales of rows [first, +count) of a matrix of the stack, both multiples of 32.
  void scales(int expert, size_t index, int first, int count, float* to) const;
  // Columns [first, +count) of one row A for a matrix of the stack, as kernels multiply them. `first` is a multiple of
  // 64 and `count` another, or a multiple of 32 that ends the matrix; `room` has a multiple of 64 floats.
  void prepare(const float* a, const float* scales, size_t index, int first, int count, float* room,
               uint8_t* row) const;

  void reserve(WorkerScratch& scratch, int rows, int node) const;
  // `rows` are prepared ones; the epilogue is that of GroupedGemm::multiply.
  template <class Epilogue>
  void multiply(WorkerScratch& scratch, int expert, const Strip& strip, const GroupedGemm::Rows& rows,
                Epilogue epilogue) const {
    uint8_t* const panels = scratch.decoded.data();
    transpose(expert, strip, panels);
    gemm_.multiply(scratch, {panels, strip.panels, panels}, rows, epilogue);
  }

 private:
  int rows_of(size_t index) const;
  // Row of the stack that a matrix begins at.
  int begin_of(size_t index) const;
  void transpose(int expert, const Strip& strip, uint8_t* to) const;

  const ExpertWeights& weights_;
  std::vector<Projection> stack_;
  const KernelSet& kernels_;
  PanelLayout layout_;
  GroupedGemm gemm_;
  int strip_panels_;
};

}  // namespace kt
