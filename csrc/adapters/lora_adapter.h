// A LoRA of the experts of a layer that serves: computed beside their packed weights, whatever their format.
//
//   p = scale * x A^T              before gate and up, 32 rows of an expert at a time, fp32
//   g += p B^T, u likewise         to each product, before SwiGLU
//   p = scale * h A^T              between SwiGLU and down
//   y += p B^T                     to each product of down
//
// As training/forward.h, for calls of which nothing is saved; the matrices are packed once.
#pragma once

#include <memory>
#include <vector>

#include "moe/layer_adapter.h"
#include "training/lora.h"
#include "training/row_blocks.h"

namespace kt {

class LoraAdapter : public LayerAdapter {
 public:
  // Packs on all threads of `engine`, which the caller holds; the tensors of `lora` are not used afterwards.
  LoraAdapter(const Lora& lora, const LayerShape& shape, Engine& engine);

  PassAdditions& additions(Engine& engine, const RowKernels& rows, const Routing& routing,
                           const ForwardArgs& args) override;
  std::vector<double> product(Projection which, int expert, const std::vector<double>& x) const override;
  size_t bytes() const { return memory_.size(); }

 private:
  class Call;

  const LayerShape shape_;
  Buffer memory_;
  const PackedLora lora_;
  Buffer projected_;  // of a call: gate, up and down, [3][pairs][rank]
  std::shared_ptr<Call> call_;
};

// Whoever computes the layer's next calls does so with `lora`; null: without. Throws std::runtime_error before the
// weights are loaded.
void adapt(MoeLayer& layer, const Lora* lora);

}  // namespace kt
