// What a forward pass computes besides, for those who train or adapt experts: called with what it has on its way.
#pragma once

#include "core/thread_pool.h"
#include "kernels/kernel_set.h"
#include "moe/routing.h"

namespace kt {

// Panels of one matrix in a product of some rows: `distance` floats from one panel to the next.
struct ProductPanels {
  float* first;
  size_t stride;
  size_t distance;
  int panels;
  int rows;
};

// Which rows and columns of the whole result a product is.
struct ProductPlace {
  const ActiveExpert& expert;
  int first_pair;
  int first_column;
};

// SwiGLU's outputs by pair: `stride` bytes from a row to the next, elements of the row kernels.
struct IntermediateRows {
  const uint8_t* data;
  size_t stride;
  const RowKernels& kernels;
};

class PassAdditions {
 public:
  virtual ~PassAdditions() = default;

  // Pieces that are computed before gate and up, and between SwiGLU and down.
  virtual int pieces_before_gate_up() const = 0;
  virtual void before_gate_up(const Worker& worker, int piece) = 0;
  virtual int pieces_before_down() const = 0;
  virtual void before_down(const Worker& worker, int piece, const IntermediateRows& rows) = 0;

  // Products of the base matrices and their biases, which may be changed.
  virtual void gate_up(const ProductPlace& place, const ProductPanels& gate, const ProductPanels& up) = 0;
  virtual void down(const ProductPlace& place, const ProductPanels& product) = 0;
};

}  // namespace kt
