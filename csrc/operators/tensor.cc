#include "operators/tensor.h"

#include <stdexcept>

namespace kt {
namespace {

struct TypeFacts {
  const char* name;
  size_t bytes;
};
constexpr TypeFacts kFacts[kElementTypes] = {{"float32", 4}, {"bfloat16", 2},     {"float16", 2}, {"float64", 8},
                                             {"int64", 8},   {"int32", 4},        {"uint8", 1},   {"int8", 1},
                                             {"bool", 1},    {"float8_e4m3fn", 1}};

}  // namespace

size_t bytes_of(ElementType type) { return kFacts[static_cast<int>(type)].bytes; }
const char* name_of(ElementType type) { return kFacts[static_cast<int>(type)].name; }

std::string TensorView::text() const {
  std::string result = std::string(name_of(type)) + " [";
  for (int d = 0; d < dims; ++d) result += (d == 0 ? "" : ", ") + std::to_string(sizes[d]);
  return result + "]";
}

MatrixView matrix_view(const TensorView& tensor, const char* name) {
  const auto refuse = [&](const char* expected) {
    throw std::invalid_argument(std::string(name) + " is " + tensor.text() + "; expected " + expected);
  };
  if (tensor.dims < 1) refuse("at least one dimension");
  if (tensor.size(-1) != 1 && tensor.stride(-1) != 1) refuse("elements of a row side by side");
  int64_t rows = 1;
  int64_t stride = tensor.dims >= 2 ? tensor.stride(-2) : tensor.size(-1);
  for (int d = tensor.dims - 2; d >= 0; --d) {
    if (tensor.size(d) != 1 && rows != 1 && tensor.stride(d) != stride * rows) {
      refuse("rows at equal distances");
    }
    if (rows == 1) stride = tensor.stride(d);
    rows *= tensor.size(d);
  }
  return {tensor.bytes(), tensor.type, rows, tensor.size(-1), stride * static_cast<int64_t>(bytes_of(tensor.type))};
}

}  // namespace kt
