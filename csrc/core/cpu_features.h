// What this CPU and this operating system can execute, as a set (ISA extensions do not form a ladder:
// Zen 4 has BF16 and VNNI without AMX, Cascade Lake VNNI without BF16, Arrow Lake AVX-VNNI without AVX512).
//
// Contract: `detected` is what CPUID says and XGETBV confirms (the OS saves the registers); for AMX Linux is asked
// for permission to use the tile registers. `active` is the detected set capped by KT_KERNEL_CPU_VARIANT.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kt {

enum class Feature : uint32_t {
  kAvx2,
  kFma,
  kF16c,
  kAvxVnni,
  kAvx512f,
  kAvx512bw,
  kAvx512vl,
  kAvx512dq,
  kAvx512vnni,
  kAvx512bf16,
  kAvx512vbmi,
  kFmaBeatsDot,  // FMA multiplies fp32 faster than VDPBF16PS multiplies bf16, and rounds alike
  kAmxTile,
  kAmxBf16,
  kAmxInt8,
  kCount,
};

class FeatureSet {
 public:
  constexpr FeatureSet() = default;
  constexpr FeatureSet(std::initializer_list<Feature> features) {
    for (Feature f : features) bits_ |= bit(f);
  }
  constexpr void add(Feature f) { bits_ |= bit(f); }
  constexpr bool has(Feature f) const { return (bits_ & bit(f)) != 0; }
  constexpr bool includes(FeatureSet other) const { return (bits_ & other.bits_) == other.bits_; }
  constexpr FeatureSet operator&(FeatureSet other) const { return FeatureSet(bits_ & other.bits_); }
  constexpr FeatureSet operator|(FeatureSet other) const { return FeatureSet(bits_ | other.bits_); }
  constexpr FeatureSet minus(FeatureSet other) const { return FeatureSet(bits_ & ~other.bits_); }
  std::vector<std::string> names() const;

 private:
  explicit constexpr FeatureSet(uint32_t bits) : bits_(bits) {}
  static constexpr uint32_t bit(Feature f) { return 1u << static_cast<uint32_t>(f); }
  uint32_t bits_ = 0;
};

struct CpuFeatures {
  FeatureSet detected;
  FeatureSet active;     // detected, capped
  std::string variant;   // highest named variant whose features are all active
  std::string cap;       // value of KT_KERNEL_CPU_VARIANT, empty when unset
  std::string no_tiles;  // why AMX, which the CPU has, is not detected; empty otherwise
};

// Reads the CPU once; throws std::invalid_argument for an unknown KT_KERNEL_CPU_VARIANT, one this CPU cannot run,
// or a CPU without AVX2 and FMA.
const CpuFeatures& cpu_features();

}  // namespace kt
