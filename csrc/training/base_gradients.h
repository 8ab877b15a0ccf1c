// Gradients of the base matrices, fp32: for each active expert, sums over its pairs of one row times another, in fp32.
//
//   dWg = dg^T x    dWu = du^T x    dWd = (w dout)^T h
#pragma once

#include "moe/weights.h"
#include "training/gradient_inputs.h"

namespace kt {

// gate, up [experts, intermediate, hidden], down [experts, hidden, intermediate].
using BaseGradients = PerProjection<float*>;

class BaseGradientPieces {
 public:
  BaseGradientPieces(Engine& engine, const LayerShape& shape, const Routing& routing, const BaseGradients& gradients);

  // Some rows of a matrix of an expert each.
  int count() const { return static_cast<int>(routing_.experts().size()) * strips_of_expert(); }
  void compute(const GradientInputs& inputs, const Worker& worker, int piece) const;

 private:
  struct Strip {
    Projection which;
    int first;  // row of the matrix
    int rows;
  };
  int strips_of_expert() const;
  Strip strip_of(int index) const;
  // Rows of pairs [pair, +count): the strip's columns of what the matrix gave, and all of what it was given.
  void load_left(const GradientInputs& inputs, const Strip& strip, int pair, int count, float* to) const;
  void load_right(const GradientInputs& inputs, const Strip& strip, int pair, int count, float* to) const;
  MatrixShape matrix(Projection which) const;

  Engine& engine_;
  const LayerShape& shape_;
  const Routing& routing_;
  const BaseGradients& gradients_;
  const TrainingKernels& kernels_;
};

}  // namespace kt
