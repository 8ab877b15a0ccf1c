// The experts of a MoE layer as an operator, so that they are part of a recorded step.
#include <stdexcept>

#include "linear/activation_rows.h"
#include "moe/layer.h"
#include "operators/handles.h"
#include "operators/registry.h"

namespace kt {
namespace {

void require_contiguous(const TensorView& tensor, const char* name) {
  if (tensor.dims == 2 && tensor.stride(1) == 1 && (tensor.stride(0) == tensor.size(1) || tensor.size(0) == 1)) return;
  throw std::invalid_argument(std::string(name) + " of experts are " + tensor.text() +
                              "; expected a contiguous matrix");
}

void experts(Call& call) {
  const std::shared_ptr<MoeLayer> layer = Handles<MoeLayer>::find(call.integer(0));
  const TensorView hidden = call.tensor(1), ids = call.tensor(2), weights = call.tensor(3);
  require_contiguous(hidden, "hidden states");
  require_contiguous(ids, "ids");
  require_contiguous(weights, "weights");
  if (weights.type != ElementType::kF32 || (ids.type != ElementType::kI32 && ids.type != ElementType::kI64)) {
    throw std::invalid_argument("experts got ids " + ids.text() + " and weights " + weights.text() +
                                "; expected int32 or int64, and float32");
  }
  const TensorView out = call.result(hidden.type, {hidden.size(0), hidden.size(1)});
  const ForwardArgs args = {{static_cast<int>(hidden.size(0)), static_cast<int>(ids.size(1)), ids.data,
                             ids.type == ElementType::kI64 ? IdType::kInt64 : IdType::kInt32, weights.as<float>()},
                            hidden.data,
                            row_dtype(hidden.type),
                            out.data,
                            row_dtype(out.type),
                            Store::kOverwrite};
  if (hidden.size(1) != layer->config().shape.hidden || ids.size(0) != hidden.size(0) ||
      weights.size(0) != hidden.size(0) || weights.size(1) != ids.size(1)) {
    throw std::invalid_argument("experts got hidden states " + hidden.text() + ", ids " + ids.text() + " and weights " +
                                weights.text() + ", which do not fit");
  }
  layer->check(args);
  call.run_locking([=](Engine&) { layer->forward(args); });
}

}  // namespace

std::vector<Operator> experts_operators() {
  return {
      // `layer`: MoeLayer.handle; hidden [tokens, hidden]; ids, weights [tokens, top_k] -> [tokens, hidden]
      {"kt_kernel::experts(int layer, Tensor hidden, Tensor ids, Tensor weights) -> Tensor", experts},
  };
}

}  // namespace kt
