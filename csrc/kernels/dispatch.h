// Which kernels serve which method on this CPU: one table, read from the top, first row whose features are all
// active wins.
#pragma once

#include <string>
#include <vector>

#include "core/cpu_features.h"
#include "kernels/kernel_set.h"

namespace kt {

struct DispatchRow {
  const char* method;
  FeatureSet needs;
  const KernelSet* kernels;
  const char* machines;  // where the row wins
};

const std::vector<DispatchRow>& dispatch_table();
std::vector<std::string> available_methods();

// Throws std::invalid_argument naming the methods there are.
const KernelSet& kernels_for(const std::string& method);

}  // namespace kt
