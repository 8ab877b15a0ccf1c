#include "core/cpu_features.h"

#include "core/cpu_variants.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace kt {
namespace {

constexpr std::array<const char*, static_cast<size_t>(Feature::kCount)> kNames = {
    "avx2",        "fma",         "f16c",        "avx_vnni",      "avx512f",  "avx512bw", "avx512vl", "avx512dq",
    "avx512_vnni", "avx512_bf16", "avx512_vbmi", "fma_beats_dot", "amx_tile", "amx_bf16", "amx_int8",
};

constexpr FeatureSet kAvx2Set = {Feature::kAvx2, Feature::kFma, Feature::kF16c};
constexpr FeatureSet kAvx512Set =
    kAvx2Set | FeatureSet{Feature::kAvx512f, Feature::kAvx512bw, Feature::kAvx512vl, Feature::kAvx512dq};
constexpr FeatureSet kAvx512Vnni = kAvx512Set | FeatureSet{Feature::kAvx512vnni};
constexpr FeatureSet kAvx512Bf16 = kAvx512Vnni | FeatureSet{Feature::kAvx512bf16};
constexpr FeatureSet kFmaBeatsDot = {Feature::kFmaBeatsDot};
constexpr FeatureSet kBesideBf16 = {Feature::kAvx512vbmi, Feature::kAvxVnni};
constexpr FeatureSet kAmx = kAvx512Bf16 | FeatureSet{Feature::kAmxTile, Feature::kAmxBf16, Feature::kAmxInt8};

// A variant is a named point in the space of feature sets: `needs` makes a CPU count as this variant, and `allows`
// is what remains of a bigger CPU that is capped to it (VBMI goes with BF16: both came with Ice Lake/Zen 4 servers).
struct Variant {
  const char* name;
  FeatureSet needs;
  FeatureSet allows;
};
constexpr std::array<Variant, 7> kVariants = {{
    {"avx2", kAvx2Set, kAvx2Set},
    {"avx_vnni", kAvx2Set | FeatureSet{Feature::kAvxVnni}, kAvx2Set | FeatureSet{Feature::kAvxVnni}},
    {"avx512", kAvx512Set, kAvx512Set},
    {"avx512_vnni", kAvx512Vnni, kAvx512Vnni},
    {"avx512_bf16", kAvx512Bf16, kAvx512Bf16 | kBesideBf16},
    {"avx512_bf16_fma", kAvx512Bf16 | kFmaBeatsDot, kAvx512Bf16 | kBesideBf16 | kFmaBeatsDot},
    {"amx", kAmx, kAmx | kBesideBf16 | kFmaBeatsDot},
}};

struct Cpuid {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(uint32_t leaf, uint32_t subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

uint64_t saved_register_state() {
  uint32_t lo = 0, hi = 0;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

// Linux hands out the 8 KiB tile register file only to processes that ask (Documentation/arch/x86/xstate.rst). Returns
// why there are none, empty where there are.
std::string why_no_tiles(uint64_t state) {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtiledata = 18;
  constexpr uint64_t kTileState = 0x60000;
  if ((state & kTileState) != kTileState) return "the operating system does not save AMX tiles";
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0) return "";
  return std::string("Linux refuses AMX tiles (arch_prctl: ") + std::strerror(errno) + ")";
}

// Intel runs VDPBF16PS at half the rate of FMA from Sapphire Rapids on, the first of its servers with BF16 and VBMI,
// and no CPUID bit says so. (Emerald Rapids, 2 threads, 2026-11-21: bf16 dot 180-200 GFLOP/s, fp32 FMA 340-400.)
bool fma_beats_dot(FeatureSet set) {
  const Cpuid leaf0(0, 0);
  const uint32_t vendor[3] = {leaf0.ebx, leaf0.edx, leaf0.ecx};
  const bool intel = std::memcmp(vendor, "GenuineIntel", sizeof(vendor)) == 0;
  return intel && set.includes({Feature::kAvx512bf16, Feature::kAvx512vbmi});
}

FeatureSet detect(std::string& no_tiles) {
  FeatureSet set;
  const Cpuid leaf1(1, 0);
  const bool osxsave = bit(leaf1.ecx, 27);
  if (!osxsave || !bit(leaf1.ecx, 28)) return set;
  const uint64_t state = saved_register_state();
  const bool ymm = (state & 0x6) == 0x6;
  const bool zmm = ymm && (state & 0xE0) == 0xE0;
  const Cpuid leaf7(7, 0);
  const Cpuid leaf7_1(7, 1);

  const auto add = [&set](bool present, Feature f) {
    if (present) set.add(f);
  };
  add(ymm && bit(leaf7.ebx, 5), Feature::kAvx2);
  add(ymm && bit(leaf1.ecx, 12), Feature::kFma);
  add(ymm && bit(leaf1.ecx, 29), Feature::kF16c);
  add(ymm && bit(leaf7_1.eax, 4), Feature::kAvxVnni);
  add(zmm && bit(leaf7.ebx, 16), Feature::kAvx512f);
  add(zmm && bit(leaf7.ebx, 30), Feature::kAvx512bw);
  add(zmm && bit(leaf7.ebx, 31), Feature::kAvx512vl);
  add(zmm && bit(leaf7.ebx, 17), Feature::kAvx512dq);
  add(zmm && bit(leaf7.ecx, 11), Feature::kAvx512vnni);
  add(zmm && bit(leaf7_1.eax, 5), Feature::kAvx512bf16);
  add(zmm && bit(leaf7.ecx, 1), Feature::kAvx512vbmi);
  add(fma_beats_dot(set), Feature::kFmaBeatsDot);
  if (!zmm || !bit(leaf7.edx, 24)) return set;
  no_tiles = why_no_tiles(state);
  if (no_tiles.empty()) {
    set.add(Feature::kAmxTile);
    add(bit(leaf7.edx, 22), Feature::kAmxBf16);
    add(bit(leaf7.edx, 25), Feature::kAmxInt8);
  }
  return set;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

CpuFeatures read_features() {
  CpuFeatures f;
  f.detected = detect(f.no_tiles);
  f.active = f.detected;
  if (!f.detected.includes(kAvx2Set)) {
    throw std::invalid_argument("kt_kernel needs a CPU with AVX2, FMA and F16C; this CPU lacks " +
                                joined(kAvx2Set.minus(f.detected).names()));
  }
  if (const char* cap = std::getenv("KT_KERNEL_CPU_VARIANT"); cap != nullptr && *cap != '\0') {
    f.cap = cap;
    const Variant* wanted = nullptr;
    std::vector<std::string> known;
    for (const Variant& v : kVariants) {
      known.emplace_back(v.name);
      if (f.cap == v.name) wanted = &v;
    }
    if (wanted == nullptr) {
      throw std::invalid_argument("KT_KERNEL_CPU_VARIANT is '" + f.cap + "'; known values are " + joined(known));
    }
    if (!f.detected.includes(wanted->needs)) {
      throw std::invalid_argument("KT_KERNEL_CPU_VARIANT is '" + f.cap + "' but this CPU lacks " +
                                  joined(wanted->needs.minus(f.detected).names()) +
                                  "; unset it to use what the CPU has");
    }
    f.active = f.detected & wanted->allows;
  }
  for (const Variant& v : kVariants) {
    if (f.active.includes(v.needs)) f.variant = v.name;
  }
  return f;
}

}  // namespace

std::vector<std::string> FeatureSet::names() const {
  std::vector<std::string> out;
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (has(static_cast<Feature>(i))) out.emplace_back(kNames[i]);
  }
  return out;
}

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = read_features();
  return features;
}

std::vector<CpuVariant> cpu_variants() {
  std::vector<CpuVariant> result;
  for (const Variant& variant : kVariants) result.push_back({variant.name, variant.needs});
  return result;
}

}  // namespace kt
