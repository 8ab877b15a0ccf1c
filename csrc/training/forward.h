// The forward pass of training: that of inference (moe/forward_pass.h), with the LoRA of the
// experts added and what backward needs saved.
//
//   p = scale * x A^T              before gate and up, 32 rows of an expert at a time, fp32
//   g += p B^T, u likewise         to each product, before SwiGLU; g and u are saved
//   p = scale * h A^T              between SwiGLU and down
//   y += p B^T                     to each product of down
#pragma once

#include "moe/layer.h"
#include "training/lora.h"

namespace kt {

// What backward needs of a forward call, pairs in the order of Routing.
struct SavedRows {
  void* gate;        // [pairs, intermediate_padded]; null: not saved
  void* up;          // the same
  DType type;        // bf16 or fp32. Where SwiGLU clamps, bf16 would move numbers onto the limit.
  float* projected;  // with a LoRA, saved or not: of gate, up and down, [3, pairs, rank]
};

// Those that the layer serves with; where SwiGLU clamps, with bf16 activations if there are such kernels: beyond a
// limit there is no gradient, and numbers rounded to int8 would cross it (relative L2 of dx 0.08 in test_training.py).
PerProjection<const KernelSet*> training_kernels(const LayerConfig& config, const ExpertWeights& weights);

// As MoeLayer::forward; `lora` may be null. Hidden states and output are both bf16 or both fp32. Throws as that.
void training_forward(MoeLayer& layer, const ForwardArgs& args, const Lora* lora, const SavedRows& saved);

}  // namespace kt
