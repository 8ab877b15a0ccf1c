// Choice of experts, compiled once per instruction set (router-inl.h). Plain structs and function pointers only.
#pragma once

#include <stdint.h>

#include "kernels/norms.h"

namespace kt {

constexpr int kMostRouted = 4096;  // experts a router chooses from
constexpr int kMostChosen = 64;

// How a group of experts ranks: by its best expert, or by the sum of its two best.
enum class GroupRank : int { kBest, kBestTwo };

// Rows of logits become `chosen` experts each, best first; of equal ones the lower expert comes first. Experts rank by
// their score plus their bias, the bias counts nowhere else; without a bias they rank by their logit, which orders
// scores that round to the same number. A NaN ranks last.
struct RouterArgs {
  const uint8_t* logits;
  int64_t logits_stride;  // bytes
  int64_t rows;
  int experts;
  const float* bias;  // null: none
  int groups;         // the experts are cut into; 1: no groups
  int groups_kept;    // the best groups, from which experts come
  GroupRank group_rank;
  int chosen;
  int renormalise;  // not 0: weights are divided by their sum
  float scale;      // of the weights, in the end
  float* weights;   // [rows, chosen]
  int32_t* ids;     // [rows, chosen]
};

struct RouterKernels {
  void (*softmax[kNumberTypes])(const RouterArgs&);
  void (*sigmoid[kNumberTypes])(const RouterArgs&);
  void (*widen[kNumberTypes])(const void* from, float* to, int count);
};

extern const RouterKernels kRouterAvx2;
extern const RouterKernels kRouterAvx512;

}  // namespace kt
