#include "adapter_bindings.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "adapters/lora_adapter.h"
#include "unlocked.h"

namespace py = pybind11;

namespace {

void set_lora(const std::shared_ptr<kt::MoeLayer>& layer, const std::optional<std::vector<uintptr_t>>& tensors,
              int rank, float scale) {
  std::optional<kt::Lora> lora;
  if (tensors) {
    if (rank < 1) throw std::invalid_argument("the LoRA's rank is " + std::to_string(rank) + "; expected at least 1");
    if (tensors->size() != 6) {
      throw std::invalid_argument("got " + std::to_string(tensors->size()) + " addresses of LoRA tensors; expected 6");
    }
    const auto at = [&](int i) {
      if ((*tensors)[i] == 0) throw std::invalid_argument("a LoRA tensor has a null pointer; expected an address");
      return reinterpret_cast<const float*>((*tensors)[i]);
    };
    lora = kt::Lora{{at(0), at(1), at(2), at(3), at(4), at(5)}, rank, scale};
  }
  layer->engine().require_own_process();
  const kt::Unlocked release;
  layer->engine().queue().wait(0);  // what was submitted before computes as it was
  kt::adapt(*layer, lora ? &*lora : nullptr);
}

}  // namespace

void bind_adapters(py::module_& m) {
  m.def("set_lora", &set_lora, py::arg("layer"), py::kw_only(), py::arg("tensors"), py::arg("rank"), py::arg("scale"),
        "Every call of a loaded layer from the next on computes its experts with this LoRA.\n\n"
        "`tensors`: addresses of contiguous float32 gate_a, gate_b, up_a, up_b, down_a, down_b (shapes as in\n"
        "kt_kernel/adapters/backend.py), which are copied; None: without a LoRA again. Raises ValueError.");
}
