// What changes the experts of a layer in all of its calls: a LoRA (adapters/lora_adapter.h).
#pragma once

#include <vector>

#include "moe/pass_additions.h"
#include "moe/weights.h"

namespace kt {

struct ForwardArgs;
class Engine;

class LayerAdapter {
 public:
  virtual ~LayerAdapter() = default;

  // Of one call, on the thread that holds the engine; until the next call of this. `rows` are those of down's kernels.
  virtual PassAdditions& additions(Engine& engine, const RowKernels& rows, const Routing& routing,
                                   const ForwardArgs& args) = 0;

  // For the slow twin: what is added to the product of x, one number per row of the matrix.
  virtual std::vector<double> product(Projection which, int expert, const std::vector<double>& x) const = 0;
};

}  // namespace kt
