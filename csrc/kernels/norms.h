// Normalisation of rows, compiled once per instruction set (norms-inl.h). Tables are indexed by ElementType, of which
// the first three have kernels: fp32, bf16, fp16. Plain structs and function pointers only (see kernel_set.h).
#pragma once

#include <stdint.h>

namespace kt {

constexpr int kNumberTypes = 3;

// Rows of `columns` elements; strides in bytes.
struct NormArgs {
  const uint8_t* x;
  int64_t x_stride;
  uint8_t* residual;  // of add_rms_norm, which adds x to it
  int64_t residual_stride;
  const void* weight;  // null: ones
  const void* bias;    // of layer_norm, in the weight's type; null: zeros
  float weight_offset;
  uint8_t* y;  // may be x
  int64_t y_stride;
  int64_t rows;
  int columns;
  float eps;
};

// y = x * (weight + weight_offset) / sqrt(sum_squares / count + eps), with one sum of squares a row, made elsewhere.
struct ScaleArgs {
  NormArgs norm;
  const float* sum_squares;
  int64_t sum_squares_stride;  // bytes
  float count;
};

struct NormKernels {
  // [type of x and y][type of the weight]
  void (*rms_norm[kNumberTypes][kNumberTypes])(const NormArgs&);
  // residual += x; y = the norm of the sum: before it is rounded to the type of the residual, or after.
  void (*add_rms_norm[kNumberTypes][kNumberTypes])(const NormArgs&);
  void (*add_rms_norm_of_rounded[kNumberTypes][kNumberTypes])(const NormArgs&);
  void (*layer_norm[kNumberTypes][kNumberTypes])(const NormArgs&);
  void (*scale_rows[kNumberTypes][kNumberTypes])(const ScaleArgs&);
  float (*sum_squares[kNumberTypes])(const void* row, int columns);
};

extern const NormKernels kNormsAvx2;
extern const NormKernels kNormsAvx512;

}  // namespace kt
