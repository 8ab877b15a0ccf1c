// What the gradients of matrices are computed from, once those of their inputs and outputs are there.
#pragma once

#include "training/row_blocks.h"

namespace kt {

// Thin rows are [pairs, rank], and null without a LoRA.
struct GradientInputs {
  TensorRows hidden;           // by token
  TensorRows output_gradient;  // by token
  ElementRows dgate;           // by pair
  ElementRows dup;
  ElementRows h;
  PerProjection<const float*> projected;
  PerProjection<const float*> q;
};

}  // namespace kt
