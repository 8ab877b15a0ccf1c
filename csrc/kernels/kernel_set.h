// The contract between the portable code (moe/) and the kernels, which are compiled once per instruction set.
// Plain structs and function pointers only: this header is included by files built with -mavx512f and the like, so it
// must not define anything the linker could merge.
//
// Order of summation. A format without scales adds the products of one output element in ascending k into one fp32
// accumulator. A format with scales does so within a step of `step_k` columns, starting from zero, and then adds
// scale * (sum of the step) to the element's total with one fused multiply-add. Steps start at multiples of step_k,
// whatever the number of tokens or the blocking, and splitting K over calls continues from the stored fp32 total. So
// the result of a token does not depend on its neighbours, on the number of threads or on how the caller cuts the work.
//
// With int8 activations a step is int8_step_k columns, which share a scale of the activations, and has a sum for every
// int8_sum_k of them, which share a scale of the weights; sums are exact integers. In fp32, ascending:
//
//     step = fma(sum, scale of the weights, step) from zero, and where groups have a low step = fma(low,
//     RowGroup::total, step), for each sum; then total = fma(step, scale of the activations, total)
//
// so that the bits are the same on every instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "formats/panel_layout.h"

namespace kt {

// Element type of the rows a kernel multiplies. kInt8: every PanelLayout::int8_sum_k columns of a row have a RowGroup;
// the columns stand in the order the kernel's prepare_row gave them.
enum class Activation : int { kBf16, kF32, kInt8 };

enum class Store : int { kOverwrite, kAccumulate };

// What goes with one sum of a row of int8 activations.
struct RowGroup {
  float scale;       // of the whole step: value = scale * code. NaN where the step holds a number that is not finite.
  float total;       // sum of the codes: what groups with a low multiply
  int32_t open;      // -PanelLayout::integer_offset * that sum, what integer sums begin with,
  int16_t opens[2];  // and of the codes at positions 0, 1 and 2, 3 of every four alone, modulo 2^16
};

// Rows of activations, all with the same stride.
struct ActivationRows {
  const uint8_t* data;    // of the first row
  const uint8_t* groups;  // kInt8: RowGroups of the first row, ascending
  size_t stride;          // bytes from a row to the next, of both
};

// C[t, 32*p + r] (+)= sum over k of A[t, k] * W[32*p + r, k], for t < tokens, p < panel_count, over k_count columns
// from first_k on.
struct GemmArgs {
  const PanelLayout* layout;
  const uint8_t* panels;       // panels stand layout->panel_bytes apart
  const uint8_t* next_panels;  // what is multiplied afterwards, or likely to be: fetched ahead towards the end
  int panel_count;
  ActivationRows a;  // from column `first_k` on, 64-byte aligned
  int tokens;
  int first_k;      // multiple of kLargestStepK
  int k_count;      // multiple of kPanelK; of kLargestStepK unless the call ends at k_padded
  float* c;         // 64-byte aligned
  size_t c_stride;  // elements, a multiple of kPanelRows
  Store store;
  uint8_t* scratch;  // KernelSet::scratch_bytes(tokens, k_count), 64-byte aligned
};

// h[t, 32*p + i] = act(gate[t, panel_stride*p + i]) * up[t, panel_stride*p + i] for i < 32. `h` has the element type of
// the row kernels.
struct SwigluArgs {
  const float* gate;
  size_t gate_stride;
  const float* up;
  size_t up_stride;
  size_t panel_stride;
  int tokens;
  int panel_pairs;
  void* h;
  size_t h_stride;
  float limit;  // of gate from above and of up's magnitude; 0 = no clamp
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

// Element-wise work between the GEMMs; depends on the instruction set and the element type, not on the format.
struct RowKernels {
  Activation activation;
  int unconverted;  // DType of hidden states that are elements already, -1 = none
  void (*swiglu)(const SwigluArgs&);
  void (*weighted_sum)(const WeightedSumArgs&);
  ConvertFn load_rows[3];   // by DType: hidden states -> element type (through bf16, but for fp32 codes)
  ConvertFn store_rows[3];  // by DType: fp32 -> output type
  ConvertFn widen_rows[3];  // by DType: output type -> fp32
};

// One row of fp32, complete, becomes a row the kernel multiplies: layout->k_padded columns and their RowGroups.
struct PrepareArgs {
  const PanelLayout* layout;
  const float* from;
  uint8_t* data;
  uint8_t* groups;
};

// How much of an expert's rows and of K one call takes: a block's activations stay in L2 while panels pass by, with
// room left for the products.
struct Blocking {
  int rows;
  size_t bytes;                // of activations
  int min_k;                   // though it be more bytes
  int unit_k = kLargestStepK;  // calls begin at multiples of it, which are multiples of kLargestStepK
};

// Xeon 6 (AMX, 2 MiB L2), 2 threads, 2026-11-21, 1024 tokens, shapes S / L of bench/: 256 KiB 66 / 306 ms, 128 KiB and
// 256 tokens 71 / 313 ms, 512 KiB 66 / 365 ms.
constexpr Blocking kBlocking = {512, size_t{256} << 10, 256};

// Multiplies rows of `activation` by panels of one code type.
struct KernelSet {
  const char* name;
  Activation activation;
  int few_tokens;  // up to so many tokens of an expert go to `few`, more to `many`: the same bits
  void (*few)(const GemmArgs&);
  void (*many)(const GemmArgs&);
  Blocking blocking;
  size_t (*scratch_bytes)(int tokens, int k_count);
  void (*prepare_row)(const PrepareArgs&);  // kInt8: called once a row is complete; null elsewhere
  const RowKernels* rows;
  int few_calls = 1;  // so many calls of `few`, one after the other over the same panels, still beat `many`
};

}  // namespace kt
