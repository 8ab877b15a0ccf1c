#include "operators/rotation.h"

#include <stdexcept>

#include "kernels/tiers.h"
#include "operators/rows.h"

namespace kt {

const HeadKernels& head_kernels() {
  static const HeadKernels& chosen =
      first_active<HeadKernels>({{kAvx512Features, &kHeadsAvx512}, {kAvx2Features, &kHeadsAvx2}});
  return chosen;
}

void Rotation::at(int64_t token, Angles* result) const {
  if (rotary == 0) {
    result->rotary = 0;
    return;
  }
  const int64_t stride = positions.stride(0);
  const int64_t position = positions.type == ElementType::kI64 ? positions.as<int64_t>()[token * stride]
                                                               : positions.as<int32_t>()[token * stride];
  if (position < 0 || position >= cache.rows) {
    throw std::invalid_argument("a token stands at position " + std::to_string(position) + "; expected 0 to " +
                                std::to_string(cache.rows - 1) + ", which the rotary cache has");
  }
  angles(cache.row(position), rotary, result);
}

Rotation rotation(const TensorView& positions, const TensorView& cache, int64_t tokens, bool halves) {
  Rotation result;
  result.positions = positions;
  // Any shape that counts the tokens one after the other.
  if (positions.dims > 1) {
    result.positions.dims = 1;
    result.positions.sizes[0] = positions.elements();
    result.positions.strides[0] = positions.stride(-1);
  }
  const bool integers = positions.type == ElementType::kI64 || positions.type == ElementType::kI32;
  if (!integers || positions.dims < 1 || positions.elements() != tokens) {
    throw std::invalid_argument("positions are " + positions.text() + "; expected int64 or int32 [" +
                                std::to_string(tokens) + "]");
  }
  result.cache = matrix_view(cache, "cos_sin_cache");
  if (result.cache.columns % 2 != 0 || result.cache.columns > kLargestHead) {
    throw std::invalid_argument("cos_sin_cache is " + cache.text() + "; expected an even number of columns up to " +
                                std::to_string(kLargestHead));
  }
  result.rotary = static_cast<int>(result.cache.columns);
  const int type = number_type(cache, "cos_sin_cache");
  result.angles = halves ? head_kernels().halves_angles[type] : head_kernels().pairs_angles[type];
  return result;
}

}  // namespace kt
