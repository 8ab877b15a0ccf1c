// Gated activations, compiled once per instruction set (gates-inl.h). Tables are indexed by ElementType (norms.h).
#pragma once

#include <stdint.h>

#include "kernels/norms.h"

namespace kt {

// y = act(gate) * up over `columns` elements; y may be either.
struct GateArgs {
  const void* gate;
  const void* up;
  void* y;
  int columns;
};

using GateFn = void (*)(const GateArgs&);

// y = sigmoid(logit) * up: a gate of one number for a row.
struct RowGateArgs {
  float logit;
  const void* up;
  void* y;
  int columns;
};

// y += x * factor, the product rounded first.
struct AddScaledArgs {
  const void* x;
  float factor;
  void* y;
  int columns;
};

struct GateKernels {
  GateFn silu[kNumberTypes];
  GateFn gelu[kNumberTypes];
  GateFn gelu_tanh[kNumberTypes];
  GateFn sigmoid[kNumberTypes];
  void (*row_sigmoid[kNumberTypes])(const RowGateArgs&);
  void (*add_scaled[kNumberTypes])(const AddScaledArgs&);
};

extern const GateKernels kGatesAvx2;
extern const GateKernels kGatesAvx512;

}  // namespace kt
