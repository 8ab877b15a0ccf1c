#include "kernels/dispatch.h"

#include <algorithm>
#include <stdexcept>

#include "kernels/bf16_sets.h"

namespace kt {
namespace {

using F = Feature;
constexpr FeatureSet kAvx2 = {F::kAvx2, F::kFma, F::kF16c};
constexpr FeatureSet kAvx512 = kAvx2 | FeatureSet{F::kAvx512f, F::kAvx512bw, F::kAvx512vl, F::kAvx512dq};
constexpr FeatureSet kAvx512Bf16 = kAvx512 | FeatureSet{F::kAvx512bf16};
constexpr FeatureSet kAmxBf16 = kAvx512Bf16 | FeatureSet{F::kAmxTile, F::kAmxBf16};

}  // namespace

const std::vector<DispatchRow>& dispatch_table() {
  static const std::vector<DispatchRow> table = {
      {"BF16", kAmxBf16, &kBf16Amx, "Intel Sapphire Rapids (2023-), Granite Rapids"},
      {"BF16", kAvx512Bf16, &kBf16Avx512Bf16, "AMD Zen 4 (2022-), Zen 5; Intel Cooper Lake"},
      {"BF16", kAvx512, &kBf16Avx512, "Intel Skylake-SP (2017-), Cascade Lake, Ice Lake"},
      {"BF16", kAvx2, &kBf16Avx2, "Intel Haswell (2013-) and later clients, AMD Zen 1-3"},
  };
  return table;
}

std::vector<std::string> available_methods() {
  std::vector<std::string> methods;
  for (const DispatchRow& row : dispatch_table()) {
    if (std::find(methods.begin(), methods.end(), row.method) == methods.end()) methods.emplace_back(row.method);
  }
  return methods;
}

const KernelSet& kernels_for(const std::string& method) {
  const FeatureSet active = cpu_features().active;
  std::string known;
  for (const DispatchRow& row : dispatch_table()) {
    if (method == row.method && active.includes(row.needs)) return *row.kernels;
  }
  for (const std::string& name : available_methods()) known += (known.empty() ? "" : ", ") + name;
  throw std::invalid_argument("no kernels for method '" + method + "' in this build; available: " + known);
}

}  // namespace kt
