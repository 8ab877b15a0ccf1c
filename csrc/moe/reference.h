// The slow twin of ForwardPass: decodes the packed weights element by element and sums in double. What the fast path is
// tested against; too slow to serve with.
#pragma once

#include "moe/layer.h"

namespace kt {

// `adapter` may be null.
void reference_forward(const LayerConfig& config, const ExpertWeights& weights, const LayerAdapter* adapter,
                       const Routing& routing, const ForwardArgs& args);

}  // namespace kt
