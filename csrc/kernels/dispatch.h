// Which kernels multiply which codes on this CPU: one table, read from the top, first row whose features are all active
// wins.
#pragma once

#include <string>
#include <vector>

#include "core/cpu_features.h"
#include "formats/format.h"
#include "kernels/kernel_set.h"

namespace kt {

// What a layer may do with its experts.
enum class Operation : int { kForward };

// What a caller may ask for: kAuto takes the table's first row, the others its first row of that kind.
enum class Activations : int { kAuto, kBf16, kInt8 };

struct DispatchRow {
  Operation operation;
  CodeType codes;
  FeatureSet needs;
  const KernelSet* kernels;
  const char* machines;  // where the row wins

  // How activations are rounded before they are multiplied (kBf16 kernels may hold them as fp32 afterwards).
  Activations activations() const {
    return kernels->activation == Activation::kInt8 ? Activations::kInt8 : Activations::kBf16;
  }
  bool serves(Operation asked, const Format& format, Activations wanted) const {
    // Panels of GGUF types are for int8: with bf16 their blocks are multiplied as they are.
    const bool has_scales =
        format.blocks == nullptr || codes == CodeType::kBlocks || activations() == Activations::kInt8;
    return operation == asked && codes == format.codes && has_scales &&
           (wanted == Activations::kAuto || wanted == activations());
  }
};

const std::vector<DispatchRow>& dispatch_table();

// The row that this CPU takes; null when it has none.
const DispatchRow* chosen_row(Operation operation, const Format& format, Activations activations);

// "auto", "bf16", "int8"; activations_named throws std::invalid_argument for other names.
const char* name_of(Activations activations);
Activations activations_named(const std::string& name);
const char* name_of(Operation operation);

// A format as a layer keeps it, and what multiplies it.
struct Served {
  const Format* format;
  const KernelSet* kernels;
};

// The format, or its blocks where only they have kernels for these activations. Throws std::invalid_argument when
// neither has.
Served served(Operation operation, const Format& format, Activations activations);

}  // namespace kt
