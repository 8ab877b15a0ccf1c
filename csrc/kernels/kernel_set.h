// The contract between the portable code (moe/) and the kernels, which are compiled once per instruction set.
// Plain structs and function pointers only: this header is included by files built with -mavx512f and the like, so it
// must not define anything the linker could merge.
//
// Panels. A weight matrix [N, K] is stored as ceil(N/32) panels of 32 output rows; every format says in its header
// (formats/*.h) how the bytes of a panel run. K is padded to kPanelK with zeros.
//
// Order of summation. Every kernel adds the products of one output element in ascending k into one fp32 accumulator,
// whatever the number of tokens or the blocking; splitting K over calls continues from the stored fp32 value. So the
// result of a token does not depend on its neighbours, on the number of threads or on how the caller cuts the work.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kt {

constexpr int kPanelRows = 32;  // two AMX B tiles, two zmm of 16 output rows
constexpr int kPanelK = 32;     // one AMX tile of 32 bf16 columns

enum class DType : int { kBf16 = 0, kF16 = 1, kF32 = 2 };

enum class Activation : int { kBf16, kF32 };  // element type of the rows a kernel multiplies

enum class Store : int { kOverwrite, kAccumulate };

// C[t, 32*p + r] (+)= sum over k of A[t, k] * W[32*p + r, k], for t < tokens, p < panels, k < k_count.
struct GemmArgs {
  const uint8_t* panels;  // first panel, at the first k of this call
  size_t panel_stride;    // bytes from one panel to the next
  int panel_count;
  const void* a;    // rows of the kernel's activation type, 64-byte aligned
  size_t a_stride;  // elements, a multiple of kPanelK
  int tokens;
  int k_count;      // multiple of kPanelK
  float* c;         // 64-byte aligned
  size_t c_stride;  // elements, a multiple of kPanelRows
  Store store;
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

struct KernelSet {
  const char* name;
  Activation activation;
  void (*gemm)(const GemmArgs&);
  void (*swiglu)(const SwigluArgs&);
  void (*weighted_sum)(const WeightedSumArgs&);
  ConvertFn load_rows[3];   // by DType: hidden states -> activation type (through bf16)
  ConvertFn store_rows[3];  // by DType: fp32 -> output type
  ConvertFn widen_rows[3];  // by DType: output type -> fp32
};

}  // namespace kt
