#include "training_bindings.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "training/backward_pass.h"
#include "unlocked.h"

namespace py = pybind11;

namespace {

using kt::MoeLayer;

// Addresses of gate_a, gate_b, up_a, up_b, down_a, down_b.
using SixAddresses = std::vector<uintptr_t>;

// (addresses, rank, scale, addresses of what is kept of gate's, up's and down's inputs, or none)
using LoraTuple = std::tuple<SixAddresses, int, float, std::vector<uintptr_t>>;

template <class Float>
kt::LoraTensors<Float> lora_tensors(const SixAddresses& addresses) {
  if (addresses.size() != 6) {
    throw std::invalid_argument("got " + std::to_string(addresses.size()) + " addresses of LoRA tensors; expected 6");
  }
  const auto at = [&](int i) {
    if (addresses[i] == 0) throw std::invalid_argument("a LoRA tensor has a null pointer; expected an address");
    return reinterpret_cast<Float*>(addresses[i]);
  };
  return {at(0), at(1), at(2), at(3), at(4), at(5)};
}

std::optional<kt::Lora> lora_of(const std::optional<LoraTuple>& tuple) {
  if (!tuple) return std::nullopt;
  const auto& [addresses, rank, scale, kept] = *tuple;
  if (rank < 1) throw std::invalid_argument("the LoRA's rank is " + std::to_string(rank) + "; expected at least 1");
  kt::Lora lora{lora_tensors<const float>(addresses), rank, scale};
  if (kept.empty()) return lora;
  if (kept.size() != kt::kProjections.size()) {
    throw std::invalid_argument("got " + std::to_string(kept.size()) + " addresses of kept inputs; expected 3 or none");
  }
  for (const kt::Projection p : kt::kProjections) {
    lora.kept[p] = reinterpret_cast<const uint8_t*>(kept[static_cast<size_t>(p)]);
  }
  return lora;
}

const kt::Lora* pointer(const std::optional<kt::Lora>& lora) { return lora ? &*lora : nullptr; }

kt::DType checked_type(int dtype) {
  const auto type = static_cast<kt::DType>(dtype);
  if (type == kt::DType::kBf16 || type == kt::DType::kF32) return type;
  throw std::invalid_argument("got dtype code " + std::to_string(dtype) +
                              "; training expects bfloat16 (0) or float32 (2)");
}

kt::RoutingInput routing(int tokens, int top_k, uintptr_t ids, uintptr_t weights) {
  return {tokens, top_k, reinterpret_cast<const void*>(ids), kt::IdType::kInt64,
          reinterpret_cast<const float*>(weights)};
}

// (gate, up, their dtype, projected)
using SavedTuple = std::tuple<uintptr_t, uintptr_t, int, uintptr_t>;

kt::SavedRows saved_rows(const SavedTuple& saved) {
  const auto& [gate, up, dtype, projected] = saved;
  return {reinterpret_cast<void*>(gate), reinterpret_cast<void*>(up), checked_type(dtype),
          reinterpret_cast<float*>(projected)};
}

kt::BaseGradients base_tensors(const std::vector<uintptr_t>& addresses) {
  if (addresses.empty()) return {};
  if (addresses.size() != kt::kProjections.size()) {
    throw std::invalid_argument("got " + std::to_string(addresses.size()) + " addresses of gradients of gate, up and " +
                                "down; expected 3 or none");
  }
  kt::BaseGradients gradients;
  for (size_t i = 0; i < addresses.size(); ++i) gradients.values[i] = reinterpret_cast<float*>(addresses[i]);
  return gradients;
}

void prepare(MoeLayer& layer) {
  layer.engine().require_own_process();
  layer.engine().queue().wait(0);  // first in, first out with queued tasks
}

void forward(const std::shared_ptr<MoeLayer>& layer, int tokens, int top_k, int dtype, uintptr_t hidden, uintptr_t ids,
             uintptr_t weights, uintptr_t output, const SavedTuple& saved_tuple,
             const std::optional<LoraTuple>& lora_tuple) {
  const std::optional<kt::Lora> lora = lora_of(lora_tuple);
  const kt::SavedRows saved = saved_rows(saved_tuple);
  if (lora && saved.projected == nullptr) {
    throw std::invalid_argument("projected is a null pointer; a LoRA needs it");
  }
  const kt::DType type = checked_type(dtype);
  const kt::ForwardArgs args = {routing(tokens, top_k, ids, weights),
                                reinterpret_cast<const void*>(hidden),
                                type,
                                reinterpret_cast<void*>(output),
                                type,
                                kt::Store::kOverwrite};
  const kt::Unlocked release;
  prepare(*layer);
  kt::training_forward(*layer, args, pointer(lora), saved);
}

void backward(const std::shared_ptr<MoeLayer>& layer, int tokens, int top_k, int dtype, uintptr_t hidden, uintptr_t ids,
              uintptr_t weights, const SavedTuple& saved, uintptr_t output_gradient,
              const std::optional<LoraTuple>& lora_tuple, uintptr_t hidden_gradient, uintptr_t weight_gradient,
              const std::optional<SixAddresses>& lora_gradients, const std::vector<uintptr_t>& base_gradients) {
  const std::optional<kt::Lora> lora = lora_of(lora_tuple);
  if (lora_gradients && !lora) throw std::invalid_argument("gradients of a LoRA were asked for without a LoRA");
  std::optional<kt::LoraTensors<float>> gradients;
  if (lora_gradients) gradients = lora_tensors<float>(*lora_gradients);
  kt::BackwardArgs args{};
  args.routing = routing(tokens, top_k, ids, weights);
  args.hidden = reinterpret_cast<const void*>(hidden);
  args.saved = saved_rows(saved);
  args.output_gradient = reinterpret_cast<const void*>(output_gradient);
  args.type = checked_type(dtype);
  args.hidden_gradient = reinterpret_cast<void*>(hidden_gradient);
  args.weight_gradient = reinterpret_cast<float*>(weight_gradient);
  args.lora = pointer(lora);
  args.lora_gradients = gradients ? &*gradients : nullptr;
  const kt::BaseGradients base = base_tensors(base_gradients);
  args.base_gradients = base_gradients.empty() ? nullptr : &base;
  const kt::Unlocked release;
  prepare(*layer);
  kt::training_backward(*layer, args);
}

}  // namespace

void bind_training(py::module_& m) {
  m.def("training_forward", &forward, py::arg("layer"), py::kw_only(), py::arg("tokens"), py::arg("top_k"),
        py::arg("dtype"), py::arg("hidden"), py::arg("ids"), py::arg("weights"), py::arg("output"), py::arg("saved"),
        py::arg("lora") = py::none(),
        "The output of a layer with bf16 activations and a LoRA; addresses of contiguous tensors.\n\n"
        "`hidden`, `output` [tokens, hidden] of `dtype` (0 bfloat16, 2 float32), `ids` int64 and `weights` float32\n"
        "[tokens, top_k]; `lora`: ((gate_a, gate_b, up_a, up_b, down_a, down_b), rank, scale, kept), float32; kept:\n"
        "[] or bool tensors [tokens * top_k, columns], dropout of the inputs of gate_a, up_a and down_a, whose\n"
        "1 / (1 - p) the scale has. `saved` for backward: (gate, up, their dtype, projected), gate and up [pairs, "
        "intermediate rounded up to 32] (0: not\n"
        "saved), and with a LoRA, always, projected float32 [3, pairs, rank]. Pairs are the ids that are not -1.\n"
        "Raises ValueError.");
  m.def("training_backward", &backward, py::arg("layer"), py::kw_only(), py::arg("tokens"), py::arg("top_k"),
        py::arg("dtype"), py::arg("hidden"), py::arg("ids"), py::arg("weights"), py::arg("saved"),
        py::arg("output_gradient"), py::arg("lora") = py::none(), py::arg("hidden_gradient") = uintptr_t{0},
        py::arg("weight_gradient") = uintptr_t{0}, py::arg("lora_gradients") = py::none(),
        py::arg("base_gradients") = std::vector<uintptr_t>(),
        "The gradients of a call of training_forward with the same arguments; 0 or None: not wanted.\n\n"
        "`hidden_gradient` [tokens, hidden] of `dtype`; `weight_gradient` float32 [tokens, top_k], of which entries\n"
        "with id -1 are left alone; `lora_gradients`: six addresses of float32 tensors like the LoRA's, of which\n"
        "experts without tokens are left alone; `base_gradients`: the same of float32 gate, up and down as a\n"
        "checkpoint has them, [experts, intermediate, hidden] and [experts, hidden, intermediate]. Raises ValueError.");
}
