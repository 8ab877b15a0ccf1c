// The rotation of heads by a token's position, out of SGLang's cache of cosines and sines.
#pragma once

#include "kernels/heads.h"
#include "operators/tensor.h"

namespace kt {

const HeadKernels& head_kernels();

// `rotary` is 0 where nothing turns.
struct Rotation {
  TensorView positions;
  MatrixView cache;  // [positions, rotary]
  int rotary = 0;
  void (*angles)(const void* row, int rotary, Angles* angles) = nullptr;

  // Throws std::invalid_argument for positions that the cache lacks.
  void at(int64_t token, Angles* result) const;
};

// `halves`: partners stand half of the columns apart (kernels/heads.h). Throws std::invalid_argument for tensors that
// cannot be positions of so many tokens, or a cache.
Rotation rotation(const TensorView& positions, const TensorView& cache, int64_t tokens, bool halves);

}  // namespace kt
