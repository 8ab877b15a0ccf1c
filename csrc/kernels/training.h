// What training computes beside the large products, compiled once per instruction set (training-inl.h, decode-inl.h):
// products with the thin matrices of a LoRA, SwiGLU backward, and panels decoded to bf16. All of it in fp32, every sum
// in an order that depends on nothing but the number of columns or rows summed. Plain structs and function pointers
// only (see kernel_set.h).
#pragma once

#include "formats/panel_layout.h"

namespace kt {

// out[i, j] = scale * sum over c of x[i, c] * a[j, c], for i < rows, j < rank. `columns` is a multiple of kPanelRows.
struct DotRowsArgs {
  const float* x;
  size_t x_stride;  // elements, as are all
  int rows;
  const float* a;
  size_t a_stride;
  int rank;
  int columns;
  float scale;
  float* out;
  size_t out_stride;
};

// out[i, c] += sum over l of left(i, l) * right[l, c], ascending, from the stored number on, so that a sum may be cut
// anywhere. left(i, l) = left[i * left_row + l * left_column]; `columns` is a multiple of kPanelRows.
struct AddOuterArgs {
  const float* left;
  size_t left_row;
  size_t left_column;
  int rows;
  int depth;
  const float* right;
  size_t right_stride;
  int columns;
  float* out;
  size_t out_stride;
};

// One row's `columns` (a multiple of kPanelRows) from `dh`, the gradient of SwiGLU's output without the routing weight:
//
//   h = act(gate, up)     sums[p] = sum of dh * h over panel p's 32 columns
//   dgate, dup = weight * dh * the derivatives of act
//
// A clamped input gets no gradient, one that is the limit itself does. Results may be written over inputs.
struct SwigluBackwardArgs {
  const float* dh;
  const float* gate;
  const float* up;
  float weight;
  int columns;
  float limit;  // as in SwigluArgs
  float alpha;
  float* dgate;
  float* dup;
  float* h;
  float* sums;
};

// Columns [first, +columns) of a panel, both multiples of 32, as the number each code and its scale mean, rounded once
// to bf16; in the order of bf16 panels (formats/codes/bf16.h).
struct DecodeArgs {
  const PanelLayout* layout;
  const uint8_t* panel;
  int first;
  int columns;
  uint8_t* out;  // 64-byte aligned
};

// 32 rows x 32 columns of a bf16 panel become 32 columns x 32 rows of one: `from` and `to` are 16 chunks each.
using TransposeFn = void (*)(const uint8_t* from, uint8_t* to);

struct TrainingKernels {
  void (*dot_rows)(const DotRowsArgs&);
  void (*add_outer)(const AddOuterArgs&);
  void (*swiglu_backward)(const SwigluBackwardArgs&);
};

struct DecodeKernels {
  void (*e4m3)(const DecodeArgs&);
  void (*code4)(const DecodeArgs&);
  void (*int8)(const DecodeArgs&);
  TransposeFn transpose;
};

extern const TrainingKernels kTrainingAvx2;
extern const TrainingKernels kTrainingAvx512;
extern const DecodeKernels kDecodeAvx2;
extern const DecodeKernels kDecodeAvx512;

}  // namespace kt
