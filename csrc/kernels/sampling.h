// Weights of the next token, compiled once per instruction set (sampling-inl.h). Plain structs and function pointers
// only.
#pragma once

#include <stdint.h>

namespace kt {

struct SamplingKernels {
  // weights[i] = exp((logits[i] - largest) / temperature): 1 for the largest logit, 0 for minus infinity, NaN for NaN.
  // Where the largest is infinite, some are NaN, too.
  void (*weigh)(const float* logits, float* weights, int count, float temperature);
};

extern const SamplingKernels kSamplingAvx2;
extern const SamplingKernels kSamplingAvx512;

}  // namespace kt
