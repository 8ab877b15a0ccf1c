#include "kernels/dispatch.h"

#include <algorithm>
#include <stdexcept>

#include "kernels/kernel_sets.h"

namespace kt {
namespace {

using F = Feature;
constexpr FeatureSet kAvx2 = {F::kAvx2, F::kFma, F::kF16c};
constexpr FeatureSet kAvx512 = kAvx2 | FeatureSet{F::kAvx512f, F::kAvx512bw, F::kAvx512vl, F::kAvx512dq};
constexpr FeatureSet kAvx512Bf16 = kAvx512 | FeatureSet{F::kAvx512bf16};
constexpr FeatureSet kAvx512Vbmi = kAvx512Bf16 | FeatureSet{F::kAvx512vbmi};
constexpr FeatureSet kFmaBeatsDot = {F::kFmaBeatsDot};
constexpr FeatureSet kAmxBf16 = kAvx512Bf16 | FeatureSet{F::kAmxTile, F::kAmxBf16};

constexpr const char* kZen4 = "AMD Zen 4 (2022-), Zen 5";
constexpr const char* kZen4CooperLake = "AMD Zen 4 (2022-), Zen 5; Intel Cooper Lake";
constexpr const char* kSapphireRapids = "Intel Sapphire Rapids (2023-), Granite Rapids";
constexpr const char* kSkylakeSp = "Intel Skylake-SP (2017-), Cascade Lake, Ice Lake";
constexpr const char* kHaswell = "Intel Haswell (2013-) and later clients, AMD Zen 1-3";

}  // namespace

const std::vector<DispatchRow>& dispatch_table() {
  static const std::vector<DispatchRow> table = {
      {"BF16", kAmxBf16, &kBf16Amx, kSapphireRapids},
      {"BF16", kAvx512Bf16, &kBf16Avx512Bf16, kZen4CooperLake},
      {"BF16", kAvx512, &kBf16Avx512, kSkylakeSp},
      {"BF16", kAvx2, &kBf16Avx2, kHaswell},
      {"FP8", kAvx512Vbmi | kFmaBeatsDot, &kE4m3Avx512Bf16Fma, kSapphireRapids},
      {"FP8", kAvx512Vbmi, &kE4m3Avx512Bf16, kZen4},
      {"FP8", kAvx512, &kE4m3Avx512, kSkylakeSp},
      {"FP8", kAvx2, &kE4m3Avx2, kHaswell},
      {"FP8_PERCHANNEL", kAvx512Vbmi | kFmaBeatsDot, &kE4m3Avx512Bf16Fma, kSapphireRapids},
      {"FP8_PERCHANNEL", kAvx512Vbmi, &kE4m3Avx512Bf16, kZen4},
      {"FP8_PERCHANNEL", kAvx512, &kE4m3Avx512, kSkylakeSp},
      {"FP8_PERCHANNEL", kAvx2, &kE4m3Avx2, kHaswell},
      {"MXFP8", kAvx512Vbmi | kFmaBeatsDot, &kE4m3Avx512Bf16Fma, kSapphireRapids},
      {"MXFP8", kAvx512Vbmi, &kE4m3Avx512Bf16, kZen4},
      {"MXFP8", kAvx512, &kE4m3Avx512, kSkylakeSp},
      {"MXFP8", kAvx2, &kE4m3Avx2, kHaswell},
      {"RAWINT4", kAvx512Bf16 | kFmaBeatsDot, &kCode4Avx512Bf16Fma, kSapphireRapids},
      {"RAWINT4", kAvx512Bf16, &kCode4Avx512Bf16, kZen4CooperLake},
      {"RAWINT4", kAvx512, &kCode4Avx512, kSkylakeSp},
      {"RAWINT4", kAvx2, &kCode4Avx2, kHaswell},
      {"GPTQ_INT4", kAvx512Bf16 | kFmaBeatsDot, &kCode4Avx512Bf16Fma, kSapphireRapids},
      {"GPTQ_INT4", kAvx512Bf16, &kCode4Avx512Bf16, kZen4CooperLake},
      {"GPTQ_INT4", kAvx512, &kCode4Avx512, kSkylakeSp},
      {"GPTQ_INT4", kAvx2, &kCode4Avx2, kHaswell},
      {"MXFP4", kAvx512Bf16 | kFmaBeatsDot, &kCode4Avx512Bf16Fma, kSapphireRapids},
      {"MXFP4", kAvx512Bf16, &kCode4Avx512Bf16, kZen4CooperLake},
      {"MXFP4", kAvx512, &kCode4Avx512, kSkylakeSp},
      {"MXFP4", kAvx2, &kCode4Avx2, kHaswell},
      {"NVFP4", kAvx512Bf16 | kFmaBeatsDot, &kCode4Avx512Bf16Fma, kSapphireRapids},
      {"NVFP4", kAvx512Bf16, &kCode4Avx512Bf16, kZen4CooperLake},
      {"NVFP4", kAvx512, &kCode4Avx512, kSkylakeSp},
      {"NVFP4", kAvx2, &kCode4Avx2, kHaswell},
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
