// A tensor as a kernel sees it: memory, element type, sizes and strides. It owns nothing.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace kt {

enum class ElementType : int { kF32, kBf16, kF16, kF64, kI64, kI32, kU8, kI8, kBool, kE4m3 };
constexpr int kElementTypes = 10;

size_t bytes_of(ElementType type);
const char* name_of(ElementType type);

constexpr int kMaxDims = 6;

struct TensorView {
  void* data = nullptr;  // null: an optional argument that is None (an empty tensor may have one, too)
  ElementType type = ElementType::kF32;
  int dims = 0;
  std::array<int64_t, kMaxDims> sizes{};
  std::array<int64_t, kMaxDims> strides{};  // elements

  bool given() const { return data != nullptr; }
  // Negative dimensions count from the last.
  int64_t size(int d) const { return sizes[d < 0 ? dims + d : d]; }
  int64_t stride(int d) const { return strides[d < 0 ? dims + d : d]; }
  int64_t elements() const {
    int64_t product = 1;
    for (int d = 0; d < dims; ++d) product *= sizes[d];
    return product;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  uint8_t* bytes() const { return static_cast<uint8_t*>(data); }

  // "bfloat16 [4, 2048]", for messages.
  std::string text() const;
};

// [tokens, columns] with columns side by side: what most operators take. Leading dimensions fold into tokens where
// their strides allow it. Throws std::invalid_argument naming the argument otherwise.
struct MatrixView {
  uint8_t* data;
  ElementType type;
  int64_t rows;
  int64_t columns;
  int64_t row_bytes;  // from a row to the next
  uint8_t* row(int64_t i) const { return data + i * row_bytes; }
};
MatrixView matrix_view(const TensorView& tensor, const char* name);

}  // namespace kt
