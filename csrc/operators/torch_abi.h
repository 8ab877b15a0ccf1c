// The functions of torch's stable C ABI that operators need, looked up in the torch this process has loaded: the
// extension is built without torch and linked to nothing of it. (Types and shapes: torch/csrc/stable/c/shim.h and
// torch/csrc/inductor/aoti_torch/c/shim.h of torch 2.13.)
#pragma once

#include <cstdint>

#include "operators/tensor.h"

namespace kt {

using TensorHandle = void*;   // owning
using LibraryHandle = void*;  // owning
using StackValue = uint64_t;  // what an operator's arguments and results travel as
using BoxedKernel = void (*)(StackValue* stack, uint64_t arguments, uint64_t results);

// All return 0 on success.
struct TorchAbi {
  int (*library_init_fragment)(const char* name_space, const char* file, uint32_t line, LibraryHandle* library);
  int (*library_init_impl)(const char* name_space, const char* dispatch_key, const char* file, uint32_t line,
                           LibraryHandle* library);
  int (*library_def)(LibraryHandle library, const char* schema);
  int (*library_impl)(LibraryHandle library, const char* name, BoxedKernel kernel, uint64_t built_for);
  int (*new_tensor_handle)(TensorHandle tensor, TensorHandle* copy);
  int (*delete_tensor_object)(TensorHandle tensor);
  int (*get_data_ptr)(TensorHandle tensor, void** data);
  int (*get_dim)(TensorHandle tensor, int64_t* dims);
  int (*get_sizes)(TensorHandle tensor, int64_t** sizes);
  int (*get_strides)(TensorHandle tensor, int64_t** strides);
  int (*get_dtype)(TensorHandle tensor, int32_t* dtype);
  int (*empty_strided)(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type,
                       int32_t device_index, TensorHandle* tensor);
  int (*from_blob)(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset,
                   int32_t dtype, int32_t device_type, int32_t device_index, TensorHandle* tensor, int32_t layout,
                   const uint8_t* opaque, int64_t opaque_bytes, void (*deleter)(void* data, void* context),
                   void* context);
  int (*delete_stable_ivalue)(StackValue* value);
  int (*delete_string)(void* string);
  int (*list_size)(void* list, size_t* size);
  int (*list_get_item)(void* list, size_t index, StackValue* value);
  int (*delete_list)(void* list);

  int32_t dtype_code[kElementTypes];  // torch's number of an ElementType
  int32_t cpu;                        // torch's number of the CPU
  int32_t strided;                    // and of the strided layout

  TensorView view(TensorHandle tensor) const;
  // Contiguous. Throws std::runtime_error when torch cannot allocate it.
  TensorHandle empty(ElementType type, const int64_t* sizes, int dims) const;
};

// Throws std::runtime_error naming what is missing: no torch in this process, or an older one than 2.13.
const TorchAbi& torch_abi();

}  // namespace kt
