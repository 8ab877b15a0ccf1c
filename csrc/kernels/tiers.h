// Kernels of one family, compiled once per instruction set: the first whose features this CPU has is taken.
#pragma once

#include <initializer_list>
#include <stdexcept>

#include "core/cpu_features.h"

namespace kt {

constexpr FeatureSet kAvx2Features = {Feature::kAvx2, Feature::kFma, Feature::kF16c};
constexpr FeatureSet kAvx512Features =
    kAvx2Features | FeatureSet{Feature::kAvx512f, Feature::kAvx512bw, Feature::kAvx512vl, Feature::kAvx512dq};
constexpr FeatureSet kAvx512Bf16Features = kAvx512Features | FeatureSet{Feature::kAvx512bf16};

template <class Kernels>
struct Tier {
  FeatureSet needs;
  const Kernels* kernels;
};

// From the fastest to the most common. Throws std::invalid_argument on CPUs without AVX2.
template <class Kernels>
const Kernels& first_active(std::initializer_list<Tier<Kernels>> tiers) {
  const FeatureSet active = cpu_features().active;
  for (const Tier<Kernels>& tier : tiers) {
    if (active.includes(tier.needs)) return *tier.kernels;
  }
  throw std::invalid_argument("this CPU lacks AVX2, FMA or F16C, which all kernels need");
}

}  // namespace kt
