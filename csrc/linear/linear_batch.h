// One call of a linear layer whose matrix is a batch of small ones (an attention head's each): the pieces of all of
// them are shared out together.
#pragma once

#include "linear/activation_rows.h"

namespace kt {

class Linear::BatchPass {
 public:
  BatchPass(const Linear& linear, const MatrixBatch& x, const MatrixBatch& out);

  void run();

 private:
  void reserve();
  void convert(const Worker& worker, int first, int last);
  void multiply(const Worker& worker, int subpool, int piece);
  // The tokens of matrix `index` as the kernels multiply them.
  RowTable rows_of(int index) const;

  const Part& part_;
  Engine& engine_;
  const MatrixBatch& x_;
  const MatrixBatch& out_;
  const KernelSet& kernels_;
  GroupedGemm gemm_;
  int panels_per_matrix_;
  int panels_per_piece_;
  int pieces_per_matrix_;
  RowTable converted_;  // of all matrices, one after the other; no data where the tokens serve as they are
};

}  // namespace kt
