// The named points in the space of feature sets, for documents and messages; cpu_features.cc has the table.
#pragma once

#include <string>
#include <vector>

#include "core/cpu_features.h"

namespace kt {

struct CpuVariant {
  std::string name;  // what KT_KERNEL_CPU_VARIANT takes
  FeatureSet needs;  // what a CPU has at least that counts as this variant
};

// From the least to the most.
std::vector<CpuVariant> cpu_variants();

}  // namespace kt
