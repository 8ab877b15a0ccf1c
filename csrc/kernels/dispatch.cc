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
constexpr FeatureSet kAmxBf16 = kAvx512Bf16 | FeatureSet{F::kAmxTile, F::kAmxBf16};

// Intel runs VDPBF16PS at half the rate of fp32 FMA, so with many tokens `avx512` is faster there than `avx512_bf16`;
// with one it is not, and that is what a user waits for most. (Emerald Rapids without AMX, 2 threads, shape S,
// 2026-11-21, `avx512_bf16` time over `avx512` time at 1 / 16 / 1024 tokens: BF16 0.99 / 0.99 / 1.33, FP8 0.98 / 0.96
// / 1.48, RAWINT4 0.92 / 1.01 / 1.60, NVFP4 0.85 / 1.01 / 1.39; the same kernel against itself at 1 token: 0.86 to
// 1.06. KT_KERNEL_CPU_VARIANT=avx512 chooses it.)
constexpr const char* kZen4 = "AMD Zen 4 (2022-), Zen 5; Intel Cooper Lake, Sapphire Rapids";
constexpr const char* kZen4Vbmi = "AMD Zen 4 (2022-), Zen 5; Intel Sapphire Rapids";
constexpr const char* kSkylakeSp = "Intel Skylake-SP (2017-), Cascade Lake, Ice Lake";
constexpr const char* kHaswell = "Intel Haswell (2013-) and later clients, AMD Zen 1-3";

}  // namespace

const std::vector<DispatchRow>& dispatch_table() {
  static const std::vector<DispatchRow> table = {
      {"BF16", kAmxBf16, &kBf16Amx, "Intel Sapphire Rapids (2023-), Granite Rapids"},
      {"BF16", kAvx512Bf16, &kBf16Avx512Bf16, kZen4},
      {"BF16", kAvx512, &kBf16Avx512, kSkylakeSp},
      {"BF16", kAvx2, &kBf16Avx2, kHaswell},
      {"FP8", kAvx512Vbmi, &kE4m3Avx512Bf16, kZen4Vbmi},
      {"FP8", kAvx512, &kE4m3Avx512, kSkylakeSp},
      {"FP8", kAvx2, &kE4m3Avx2, kHaswell},
      {"FP8_PERCHANNEL", kAvx512Vbmi, &kE4m3Avx512Bf16, kZen4Vbmi},
      {"FP8_PERCHANNEL", kAvx512, &kE4m3Avx512, kSkylakeSp},
      {"FP8_PERCHANNEL", kAvx2, &kE4m3Avx2, kHaswell},
      {"MXFP8", kAvx512Vbmi, &kE4m3Avx512Bf16, kZen4Vbmi},
      {"MXFP8", kAvx512, &kE4m3Avx512, kSkylakeSp},
      {"MXFP8", kAvx2, &kE4m3Avx2, kHaswell},
      {"RAWINT4", kAvx512Bf16, &kCode4Avx512Bf16, kZen4},
      {"RAWINT4", kAvx512, &kCode4Avx512, kSkylakeSp},
      {"RAWINT4", kAvx2, &kCode4Avx2, kHaswell},
      {"GPTQ_INT4", kAvx512Bf16, &kCode4Avx512Bf16, kZen4},
      {"GPTQ_INT4", kAvx512, &kCode4Avx512, kSkylakeSp},
      {"GPTQ_INT4", kAvx2, &kCode4Avx2, kHaswell},
      {"MXFP4", kAvx512Bf16, &kCode4Avx512Bf16, kZen4},
      {"MXFP4", kAvx512, &kCode4Avx512, kSkylakeSp},
      {"MXFP4", kAvx2, &kCode4Avx2, kHaswell},
      {"NVFP4", kAvx512Bf16, &kCode4Avx512Bf16, kZen4},
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
