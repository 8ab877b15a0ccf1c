#include "operators/torch_abi.h"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>

namespace kt {
namespace {

template <class Function>
void look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) {
    throw std::runtime_error(std::string("the torch of this process has no ") + name +
                             "; the CPU operators need torch 2.13");
  }
}

int32_t constant(void* library, const std::string& name) {
  int32_t (*get)() = nullptr;
  look_up(library, name.c_str(), get);
  return get();
}

TorchAbi load() {
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) throw std::runtime_error("no torch is loaded in this process; import torch first");
  TorchAbi abi{};
  look_up(torch, "aoti_torch_library_init_fragment", abi.library_init_fragment);
  look_up(torch, "aoti_torch_library_init_impl", abi.library_init_impl);
  look_up(torch, "aoti_torch_library_def", abi.library_def);
  look_up(torch, "torch_library_impl", abi.library_impl);
  look_up(torch, "aoti_torch_new_tensor_handle", abi.new_tensor_handle);
  look_up(torch, "aoti_torch_delete_tensor_object", abi.delete_tensor_object);
  look_up(torch, "aoti_torch_get_data_ptr", abi.get_data_ptr);
  look_up(torch, "aoti_torch_get_dim", abi.get_dim);
  look_up(torch, "aoti_torch_get_sizes", abi.get_sizes);
  look_up(torch, "aoti_torch_get_strides", abi.get_strides);
  look_up(torch, "aoti_torch_get_dtype", abi.get_dtype);
  look_up(torch, "aoti_torch_empty_strided", abi.empty_strided);
  look_up(torch, "torch_from_blob", abi.from_blob);
  look_up(torch, "torch_delete_stable_ivalue", abi.delete_stable_ivalue);
  look_up(torch, "torch_delete_string", abi.delete_string);
  look_up(torch, "torch_list_size", abi.list_size);
  look_up(torch, "torch_list_get_item", abi.list_get_item);
  look_up(torch, "torch_delete_list", abi.delete_list);
  for (int type = 0; type < kElementTypes; ++type) {
    abi.dtype_code[type] = constant(torch, std::string("aoti_torch_dtype_") + name_of(static_cast<ElementType>(type)));
  }
  abi.cpu = constant(torch, "aoti_torch_device_type_cpu");
  abi.strided = constant(torch, "aoti_torch_layout_strided");
  return abi;
}

}  // namespace

const TorchAbi& torch_abi() {
  static const TorchAbi abi = load();
  return abi;
}

TensorView TorchAbi::view(TensorHandle tensor) const {
  TensorView view;
  int64_t dims = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  if (get_dim(tensor, &dims) != 0 || get_sizes(tensor, &sizes) != 0 || get_strides(tensor, &strides) != 0 ||
      get_dtype(tensor, &dtype) != 0 || get_data_ptr(tensor, &view.data) != 0) {
    throw std::runtime_error("torch refuses to describe a tensor");
  }
  if (dims > kMaxDims) {
    throw std::invalid_argument("a tensor has " + std::to_string(dims) + " dimensions; expected at most " +
                                std::to_string(kMaxDims));
  }
  const int32_t* const code = std::find(dtype_code, dtype_code + kElementTypes, dtype);
  if (code == dtype_code + kElementTypes) {
    throw std::invalid_argument("a tensor has an element type that the CPU operators do not know (torch's number " +
                                std::to_string(dtype) + ")");
  }
  view.type = static_cast<ElementType>(code - dtype_code);
  view.dims = static_cast<int>(dims);
  std::copy_n(sizes, dims, view.sizes.begin());
  std::copy_n(strides, dims, view.strides.begin());
  return view;
}

TensorHandle TorchAbi::empty(ElementType type, const int64_t* sizes, int dims) const {
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (int d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  TensorHandle tensor = nullptr;
  if (empty_strided(dims, sizes, strides, dtype_code[static_cast<int>(type)], cpu, -1, &tensor) != 0) {
    throw std::runtime_error("torch cannot allocate a tensor of " + std::to_string(stride * bytes_of(type)) + " bytes");
  }
  return tensor;
}

}  // namespace kt
