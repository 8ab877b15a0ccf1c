// What the layers of the gated delta rule compute (Qwen3-Next, Qwen3.5), per instruction set: the recurrence, the
// causal convolution before it and the gated norm after it. Everything in fp32; results are rounded once, to the type
// of the activations. A token's result depends on its own values and its state only, however many tokens one call is
// given.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

// Columns of a head's values that one piece of work keeps in the first-level cache: 128 keys x 32 columns of fp32 are
// 16 KiB.
constexpr int kDeltaColumns = 32;
constexpr int kMostDeltaKeys = 256;
// The longest convolution.
constexpr int kMostTaps = 8;

// Tokens of one request and one value head, in kDeltaColumns columns of its values.
struct DeltaRuleArgs {
  // [keys, a multiple of 4][kDeltaColumns]; rows and columns beyond `keys` and `columns` are zero
  float* state;
  int keys;
  int columns;
  int tokens;
  float query_scale;
  float norm_epsilon;
  // Of the first token, in the type of the activations; strides are elements from a token to the next.
  const void* q;
  const void* k;
  const void* v;
  void* out;
  int64_t q_stride;
  int64_t k_stride;
  int64_t v_stride;
  int64_t out_stride;
  const float* decay;  // [tokens]
  const float* beta;   // [tokens]
};

enum class AfterConvolution { kNothing, kSilu };

// One token of a convolution, in `channels` channels.
struct ConvolutionArgs {
  int taps;
  int channels;
  int first_activation;         // rows before it are fp32, from the state; the others are activations
  const void* rows[kMostTaps];  // oldest first; null: zeros
  const void* weight;           // [taps][weight_stride], in the type of the activations
  int64_t weight_stride;
  const float* bias;  // null: none
  AfterConvolution then;
  void* out;
};

// Rows of x -> rms_norm(x) * weight * silu(gate).
struct GatedNormArgs {
  int rows;
  int columns;
  float epsilon;
  const float* weight;
  const void* x;
  const void* gate;
  void* out;
  int64_t x_stride;
  int64_t gate_stride;
  int64_t out_stride;
};

// Arrays are indexed by the type of the activations: fp32, bf16, fp16, as ElementType counts.
constexpr int kActivationTypes = 3;

struct GatedDeltaKernels {
  void (*delta_rule[kActivationTypes])(const DeltaRuleArgs&);
  void (*convolve[kActivationTypes])(const ConvolutionArgs&);
  void (*gated_norm[kActivationTypes])(const GatedNormArgs&);
  void (*widen[kActivationTypes])(const void* from, void* to, size_t count);   // to fp32
  void (*narrow[kActivationTypes])(const void* from, void* to, size_t count);  // from fp32
};

extern const GatedDeltaKernels kGatedDeltaAvx2;
extern const GatedDeltaKernels kGatedDeltaAvx512;

}  // namespace kt
