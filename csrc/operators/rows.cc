#include "operators/rows.h"

#include <stdexcept>
#include <string>

namespace kt {

int number_type(const TensorView& tensor, const char* name) {
  const int type = static_cast<int>(tensor.type);
  if (type < kNumberTypes) return type;
  throw std::invalid_argument(std::string(name) + " is " + tensor.text() + "; expected float32, bfloat16 or float16");
}

RowBlocks row_blocks(const TensorView& tensor, const char* name) {
  number_type(tensor, name);
  const bool folds = tensor.dims < 3 || tensor.size(0) <= 1 || tensor.stride(0) == tensor.size(1) * tensor.stride(1);
  if (folds) {
    const MatrixView all = matrix_view(tensor, name);
    return {all, 1, 0};
  }
  TensorView first = tensor;
  first.dims = tensor.dims - 1;
  std::copy(tensor.sizes.begin() + 1, tensor.sizes.end(), first.sizes.begin());
  std::copy(tensor.strides.begin() + 1, tensor.strides.end(), first.strides.begin());
  return {matrix_view(first, name), tensor.size(0), tensor.stride(0) * static_cast<int64_t>(bytes_of(tensor.type))};
}

void require_vector(const TensorView& vector, int64_t elements, const char* name) {
  number_type(vector, name);
  const bool side_by_side = vector.dims >= 1 && (vector.stride(-1) == 1 || vector.elements() <= 1);
  if (vector.elements() == elements && side_by_side) return;
  throw std::invalid_argument(std::string(name) + " is " + vector.text() + "; expected " + std::to_string(elements) +
                              " elements side by side");
}

}  // namespace kt
