// Heads of one token's queries or keys: their RMSNorm and their rotation by its position, compiled once per instruction
// set (heads-inl.h). Tables are indexed by ElementType (norms.h).
#pragma once

#include <stdint.h>

#include "kernels/norms.h"

namespace kt {

constexpr int kLargestHead = 1024;

// The angles of one position, for `rotary` columns: y = x * cos + partner of x * sin. Partners stand half of `rotary`
// apart (`kHalves`: GPT-NeoX) or side by side (`kPairs`: GPT-J); the sign of the first of each two is in `sin`.
struct Angles {
  int rotary;  // 0: nothing turns
  float cos[kLargestHead];
  float sin[kLargestHead];
};

struct HeadArgs {
  const uint8_t* x;
  int64_t x_stride;  // bytes from a head to the next
  uint8_t* y;        // may be x
  int64_t y_stride;
  int heads;
  int columns;          // of a head, at most kLargestHead
  const float* weight;  // of the norm; null: no norm
  float eps;
  const Angles* angles;
};

struct HeadKernels {
  // One row of a cache of cosines and sines, [rotary / 2 cosines, rotary / 2 sines].
  void (*halves_angles[kNumberTypes])(const void* row, int rotary, Angles* angles);
  void (*pairs_angles[kNumberTypes])(const void* row, int rotary, Angles* angles);
  void (*turn_halves[kNumberTypes])(const HeadArgs&);
  void (*turn_pairs[kNumberTypes])(const HeadArgs&);
  void (*widen[kNumberTypes])(const void* from, float* to, int columns);
};

extern const HeadKernels kHeadsAvx2;
extern const HeadKernels kHeadsAvx512;

}  // namespace kt
