#include "operators/packed.h"

#include <mutex>
#include <stdexcept>
#include <unordered_map>

namespace kt {
namespace {

struct Packed {
  std::shared_ptr<Linear> linear;
  bool gives_sums = false;
};

struct Table {
  std::mutex mutex;
  std::unordered_map<const void*, Packed> layers;
};

Table& table() {
  static Table* const table = new Table;  // tensors may die after static objects
  return *table;
}

void forget(void* data, void*) {
  Packed layer;
  const std::lock_guard<std::mutex> lock(table().mutex);
  const auto found = table().layers.find(data);
  if (found == table().layers.end()) return;
  layer = std::move(found->second);
  table().layers.erase(found);
}

}  // namespace

TensorHandle packed_tensor(std::shared_ptr<Linear> linear, const TensorView& shape) {
  const TorchAbi& torch = torch_abi();
  void* const data = linear->first_panel();
  std::array<int64_t, kMaxDims> strides{};
  int64_t stride = 1;
  for (int d = shape.dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= shape.sizes[d];
  }
  {
    const std::lock_guard<std::mutex> lock(table().mutex);
    table().layers[data] = {std::move(linear)};
  }
  TensorHandle tensor = nullptr;
  if (torch.from_blob(data, shape.dims, shape.sizes.data(), strides.data(), 0,
                      torch.dtype_code[static_cast<int>(shape.type)], torch.cpu, -1, &tensor, torch.strided, nullptr, 0,
                      forget, nullptr) != 0) {
    forget(data, nullptr);
    throw std::runtime_error("torch refuses a tensor over packed weights");
  }
  return tensor;
}

std::shared_ptr<Linear> packed_linear(const TensorView& weight) {
  const std::lock_guard<std::mutex> lock(table().mutex);
  const auto found = table().layers.find(weight.data);
  return found == table().layers.end() ? nullptr : found->second.linear;
}

void give_sums(const TensorView& weight) {
  require_packed(weight, "weight");
  const std::lock_guard<std::mutex> lock(table().mutex);
  table().layers[weight.data].gives_sums = true;
}

bool gives_sums(const TensorView& weight) {
  const std::lock_guard<std::mutex> lock(table().mutex);
  const auto found = table().layers.find(weight.data);
  return found != table().layers.end() && found->second.gives_sums;
}

std::shared_ptr<Linear> require_packed(const TensorView& weight, const char* name) {
  std::shared_ptr<Linear> linear = packed_linear(weight);
  if (linear == nullptr) {
    throw std::invalid_argument(std::string(name) + " is " + weight.text() +
                                " as it was loaded; expected weights of convert_weight_packed");
  }
  return linear;
}

}  // namespace kt
