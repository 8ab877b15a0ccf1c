#include "kernels/dispatch.h"

#include <stdexcept>

#include "kernels/kernel_sets.h"

namespace kt {
namespace {

using F = Feature;
using C = CodeType;
constexpr Operation kForward = Operation::kForward;
constexpr FeatureSet kAvx2 = {F::kAvx2, F::kFma, F::kF16c};
constexpr FeatureSet kAvx512 = kAvx2 | FeatureSet{F::kAvx512f, F::kAvx512bw, F::kAvx512vl, F::kAvx512dq};
constexpr FeatureSet kAvxVnni = kAvx2 | FeatureSet{F::kAvxVnni};
constexpr FeatureSet kAvx512Vnni = kAvx512 | FeatureSet{F::kAvx512vnni};
constexpr FeatureSet kAvx512Bf16 = kAvx512 | FeatureSet{F::kAvx512bf16};
constexpr FeatureSet kAvx512Vbmi = kAvx512Bf16 | FeatureSet{F::kAvx512vbmi};
constexpr FeatureSet kFmaBeatsDot = {F::kFmaBeatsDot};
constexpr FeatureSet kAmxInt8 = kAvx512Vnni | FeatureSet{F::kAmxTile, F::kAmxInt8};
constexpr FeatureSet kAmxBf16 = kAvx512Bf16 | FeatureSet{F::kAmxTile, F::kAmxBf16};
constexpr FeatureSet kAmxBf16Vbmi = kAvx512Vbmi | kAmxBf16;

constexpr const char* kZen4 = "AMD Zen 4 (2022-), Zen 5";
constexpr const char* kZen4CooperLake = "AMD Zen 4 (2022-), Zen 5; Intel Cooper Lake";
constexpr const char* kSapphireRapids = "Intel Sapphire Rapids (2023-), Granite Rapids";
constexpr const char* kSkylakeSp = "Intel Skylake-SP (2017-), Cascade Lake, Ice Lake";
constexpr const char* kCascadeLake = "AMD Zen 4 (2022-), Zen 5; Intel Cascade Lake (2019-) and later servers";
constexpr const char* kAlderLake = "Intel clients from Alder Lake (2021-) on";
constexpr const char* kAnyAvx512 = "AMD Zen 4 (2022-), Zen 5; Intel Skylake-SP (2017-) and later servers";
constexpr const char* kHaswell = "Intel Haswell (2013-) and later clients, AMD Zen 1-3";

}  // namespace

const std::vector<DispatchRow>& dispatch_table() {
  static const std::vector<DispatchRow> table = {
      {kForward, C::kBf16, kAmxBf16, &kBf16Amx, kSapphireRapids},
      {kForward, C::kBf16, kAvx512Bf16, &kBf16Avx512Bf16, kZen4CooperLake},
      {kForward, C::kBf16, kAvx512, &kBf16Avx512, kSkylakeSp},
      {kForward, C::kBf16, kAvx2, &kBf16Avx2, kHaswell},
      {kForward, C::kF32, kAvx512, &kF32Avx512, kAnyAvx512},
      {kForward, C::kF32, kAvx2, &kF32Avx2, kHaswell},
      {kForward, C::kE4m3, kAmxBf16Vbmi, &kE4m3Amx, kSapphireRapids},
      {kForward, C::kE4m3, kAvx512Vbmi | kFmaBeatsDot, &kE4m3Avx512Bf16Fma, kSapphireRapids},
      {kForward, C::kE4m3, kAvx512Vbmi, &kE4m3Avx512Bf16, kZen4},
      {kForward, C::kE4m3, kAvx512, &kE4m3Avx512, kSkylakeSp},
      {kForward, C::kE4m3, kAvx2, &kE4m3Avx2, kHaswell},
      // Int8 activations first: layer of shape S, RAWINT4, time with bf16 / time with int8 for 1 and 1024 tokens, Zen
      // 4, 2 threads, 2026-11-30: avx512_vnni 1.0 and 1.5, avx2 1.5 and 2.0. Not measured with AVX-VNNI, whose
      // instructions are fewer, and with AMX, whose int8 peak is many times the others'.
      {kForward, C::kCode4, kAmxInt8, &kCode4Int8Amx, kSapphireRapids},
      {kForward, C::kCode4, kAvx512Vnni, &kCode4Int8Avx512Vnni, kCascadeLake},
      {kForward, C::kCode4, kAvxVnni, &kCode4Int8AvxVnni, kAlderLake},
      {kForward, C::kCode4, kAvx512, &kCode4Int8Avx512, kSkylakeSp},
      {kForward, C::kCode4, kAvx2, &kCode4Int8Avx2, kHaswell},
      {kForward, C::kCode4, kAmxBf16, &kCode4Amx, kSapphireRapids},
      {kForward, C::kCode4, kAvx512Bf16 | kFmaBeatsDot, &kCode4Avx512Bf16Fma, kSapphireRapids},
      {kForward, C::kCode4, kAvx512Bf16, &kCode4Avx512Bf16, kZen4CooperLake},
      {kForward, C::kCode4, kAvx512, &kCode4Avx512, kSkylakeSp},
      {kForward, C::kCode4, kAvx2, &kCode4Avx2, kHaswell},
      {kForward, C::kInt8, kAmxInt8, &kInt8Int8Amx, kSapphireRapids},
      {kForward, C::kInt8, kAvx512Vnni, &kInt8Int8Avx512Vnni, kCascadeLake},
      {kForward, C::kInt8, kAvxVnni, &kInt8Int8AvxVnni, kAlderLake},
      {kForward, C::kInt8, kAvx512, &kInt8Int8Avx512, kSkylakeSp},
      {kForward, C::kInt8, kAvx2, &kInt8Int8Avx2, kHaswell},
      {kForward, C::kInt8, kAmxBf16, &kInt8Amx, kSapphireRapids},
      {kForward, C::kInt8, kAvx512Bf16, &kInt8Avx512Bf16, kZen4CooperLake},
      {kForward, C::kInt8, kAvx512, &kInt8Avx512, kSkylakeSp},
      {kForward, C::kInt8, kAvx2, &kInt8Avx2, kHaswell},
      {kForward, C::kCode5, kAmxInt8, &kCode5Int8Amx, kSapphireRapids},
      {kForward, C::kCode5, kAvx512Vnni, &kCode5Int8Avx512Vnni, kCascadeLake},
      {kForward, C::kCode5, kAvxVnni, &kCode5Int8AvxVnni, kAlderLake},
      {kForward, C::kCode5, kAvx512, &kCode5Int8Avx512, kSkylakeSp},
      {kForward, C::kCode5, kAvx2, &kCode5Int8Avx2, kHaswell},
      {kForward, C::kCode6, kAmxInt8, &kCode6Int8Amx, kSapphireRapids},
      {kForward, C::kCode6, kAvx512Vnni, &kCode6Int8Avx512Vnni, kCascadeLake},
      {kForward, C::kCode6, kAvxVnni, &kCode6Int8AvxVnni, kAlderLake},
      {kForward, C::kCode6, kAvx512, &kCode6Int8Avx512, kSkylakeSp},
      {kForward, C::kCode6, kAvx2, &kCode6Int8Avx2, kHaswell},
      {kForward, C::kCode3, kAmxInt8, &kCode3Int8Amx, kSapphireRapids},
      {kForward, C::kCode3, kAvx512Vnni, &kCode3Int8Avx512Vnni, kCascadeLake},
      {kForward, C::kCode3, kAvxVnni, &kCode3Int8AvxVnni, kAlderLake},
      {kForward, C::kCode3, kAvx512, &kCode3Int8Avx512, kSkylakeSp},
      {kForward, C::kCode3, kAvx2, &kCode3Int8Avx2, kHaswell},
      {kForward, C::kCode2, kAmxInt8, &kCode2Int8Amx, kSapphireRapids},
      {kForward, C::kCode2, kAvx512Vnni, &kCode2Int8Avx512Vnni, kCascadeLake},
      {kForward, C::kCode2, kAvxVnni, &kCode2Int8AvxVnni, kAlderLake},
      {kForward, C::kCode2, kAvx512, &kCode2Int8Avx512, kSkylakeSp},
      {kForward, C::kCode2, kAvx2, &kCode2Int8Avx2, kHaswell},
      {kForward, C::kCode4Wide, kAmxInt8, &kCode4WideInt8Amx, kSapphireRapids},
      {kForward, C::kCode4Wide, kAvx512Vnni, &kCode4WideInt8Avx512Vnni, kCascadeLake},
      {kForward, C::kCode4Wide, kAvxVnni, &kCode4WideInt8AvxVnni, kAlderLake},
      {kForward, C::kCode4Wide, kAvx512, &kCode4WideInt8Avx512, kSkylakeSp},
      {kForward, C::kCode4Wide, kAvx2, &kCode4WideInt8Avx2, kHaswell},
      {kForward, C::kBlocks, kAvx512, &kBlocksAvx512, kAnyAvx512},
      {kForward, C::kBlocks, kAvx2, &kBlocksAvx2, kHaswell},
  };
  return table;
}

const DispatchRow* chosen_row(Operation operation, const Format& format, Activations activations) {
  const FeatureSet active = cpu_features().active;
  for (const DispatchRow& row : dispatch_table()) {
    if (row.serves(operation, format, activations) && active.includes(row.needs)) return &row;
  }
  return nullptr;
}

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::kForward:
      return "experts";
  }
  __builtin_unreachable();
}

const char* name_of(Activations activations) {
  switch (activations) {
    case Activations::kAuto:
      return "auto";
    case Activations::kBf16:
      return "bf16";
    case Activations::kInt8:
      return "int8";
  }
  __builtin_unreachable();
}

Activations activations_named(const std::string& name) {
  for (const Activations known : {Activations::kAuto, Activations::kBf16, Activations::kInt8}) {
    if (name == name_of(known)) return known;
  }
  throw std::invalid_argument("activations are '" + name + "'; expected auto, bf16 or int8");
}

Served served(Operation operation, const Format& format, Activations activations) {
  for (const Format* kept : {&format, format.as_blocks}) {
    const DispatchRow* row = kept == nullptr ? nullptr : chosen_row(operation, *kept, activations);
    if (row != nullptr) return {kept, row->kernels};
  }
  throw std::invalid_argument(std::string(format.name) + " has no kernels for " + name_of(activations) +
                              " activations; expected auto" + (activations == Activations::kInt8 ? " or bf16" : ""));
}

}  // namespace kt
