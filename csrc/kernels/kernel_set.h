// The contract between the portable code (moe/) and the kernels, which are compiled once per instruction set.
// Plain structs and function pointers only: this header is included by files built with -mavx512f and the like, so it
// must not define anything the linker could merge.
//
// Order of summation. A format without scales adds the products of one output element in ascending k into one fp32
// accumulator. A format with scales does so within a step of `step_k` columns, starting from zero, and then adds
// scale * (sum of the step) to the element's total with one fused multiply-add. Steps start at multiples of step_k,
// whatever the number of tokens or the blocking, and splitting K over calls continues from the stored fp32 total. So
// the result of a token does not depend on its neighbours, on the number of threads or on how the caller cuts the work.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "formats/panel_layout.h"

namespace kt {

enum class Activation : int { kBf16, kF32 };  // element type of the rows a kernel multiplies

enum class Store : int { kOverwrite, kAccumulate };

// Scratch of a gemm (GemmArgs::scratch): decoded weights of one block of a panel, which stay in L1 beside the
// activations, and the block's scales in fp32.
constexpr size_t kDecodedBytes = size_t{16} << 10;
constexpr size_t kGemmScratchBytes = kDecodedBytes + kDecodedBytes / 64 / kSmallestStepK * kPanelRows * 4;

// Keeps widened rows, whose blocks are powers of two, from falling into the same sets of the L1.
constexpr size_t kWideRowPadding = 32;

// C[t, 32*p + r] (+)= sum over k of A[t, k] * W[32*p + r, k], for t < tokens, p < panel_count, over k_count columns
// from first_k on.
struct GemmArgs {
  const PanelLayout* layout;
  const uint8_t* panels;       // panels stand layout->panel_bytes apart
  const uint8_t* next_panels;  // what is multiplied afterwards, or likely to be: fetched ahead towards the end
  int panel_count;
  const void* a;    // rows of the kernel's activation type from column `first_k` on, 64-byte aligned
  size_t a_stride;  // elements, a multiple of kPanelK
  int tokens;
  int first_k;      // multiple of kLargestStepK
  int k_count;      // multiple of kPanelK; of kLargestStepK unless the call ends at k_padded
  float* c;         // 64-byte aligned
  size_t c_stride;  // elements, a multiple of kPanelRows
  Store store;
  uint8_t* scratch;  // kGemmScratchBytes, 64-byte aligned
  float* wide;       // KernelSet::widens_rows: room for `tokens` rows of k_count + kWideRowPadding, 64-byte aligned
};

// h[t, i] = act(c[t, gate i]) * c[t, up i]; gate and up panels alternate: columns [64*p, 64*p+32) are gate rows
// 32*p.., the next 32 are the same up rows. `h` has the kernel's activation type.
struct SwigluArgs {
  const float* c;
  size_t c_stride;
  int tokens;
  int panel_pairs;
  void* h;
  size_t h_stride;
  float limit;  // 0 = no clamp
  float alpha;  // 0 = silu(gate) * up, else "swigluoai": gate * sigmoid(alpha * gate) * (up + 1)
};

// sum[rows[t], :] += weights[t] * c[t, :] over `columns` (a multiple of kPanelRows); rows may repeat.
struct WeightedSumArgs {
  const float* c;
  size_t c_stride;
  int tokens;
  int columns;
  const int32_t* rows;
  const float* weights;
  float* sum;
  size_t sum_stride;
};

// Converts `count` elements; fp32 -> bf16/f16 rounds to nearest even, NaN stays NaN.
using ConvertFn = void (*)(const void* from, void* to, size_t count);

// Element-wise work between the GEMMs; depends on the instruction set and the activation type, not on the format.
struct RowKernels {
  Activation activation;
  void (*swiglu)(const SwigluArgs&);
  void (*weighted_sum)(const WeightedSumArgs&);
  ConvertFn load_rows[3];   // by DType: hidden states -> activation type (through bf16)
  ConvertFn store_rows[3];  // by DType: fp32 -> output type
  ConvertFn widen_rows[3];  // by DType: output type -> fp32
};

// Multiplies rows of `rows.activation` by panels of one code type.
struct KernelSet {
  const char* name;
  void (*gemm)(const GemmArgs&);
  const RowKernels* rows;
  bool widens_rows = false;  // gemm needs GemmArgs::wide
};

}  // namespace kt
