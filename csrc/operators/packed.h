// Weights that SGLang keeps as a tensor after `convert_weight_packed`: the tensor has the matrix's shape and type, and
// its memory is the panels of a linear layer, which is found by that address.
#pragma once

#include <memory>

#include "linear/linear.h"
#include "operators/torch_abi.h"

namespace kt {

// The tensor owns the layer. `shape` gives sizes and type.
TensorHandle packed_tensor(std::shared_ptr<Linear> linear, const TensorView& shape);

// Null for tensors that are not packed.
std::shared_ptr<Linear> packed_linear(const TensorView& weight);

// What `weight_packed_linear` gives from now on: fp32 instead of its input's type. Throws std::invalid_argument for
// tensors that are not packed.
void give_sums(const TensorView& weight);
bool gives_sums(const TensorView& weight);

// Throws std::invalid_argument for those.
std::shared_ptr<Linear> require_packed(const TensorView& weight, const char* name);

}  // namespace kt
