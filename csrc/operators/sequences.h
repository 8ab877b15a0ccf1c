// What operators over requests of several tokens share: reading indices and gates, and sharing out pieces.
#pragma once

#include <stdexcept>
#include <string>

#include "formats/numbers.h"
#include "kernels/gated_delta.h"
#include "kernels/tiers.h"
#include "moe/engine.h"
#include "operators/tensor.h"

namespace kt {

inline const GatedDeltaKernels& gated_delta_kernels() {
  static const GatedDeltaKernels& kernels =
      first_active<GatedDeltaKernels>({{kAvx512Features, &kGatedDeltaAvx512}, {kAvx2Features, &kGatedDeltaAvx2}});
  return kernels;
}

// The type's number in GatedDeltaKernels. Throws std::invalid_argument naming the argument.
inline int activation_type(const TensorView& tensor, const char* name) {
  if (tensor.type <= ElementType::kF16) return static_cast<int>(tensor.type);
  throw std::invalid_argument(std::string(name) + " is " + tensor.text() + "; expected float32, bfloat16 or float16");
}

inline void require(bool holds, const char* name, const TensorView& tensor, const char* expected) {
  if (!holds) throw std::invalid_argument(std::string(name) + " is " + tensor.text() + "; expected " + expected);
}

inline void require_indices(const TensorView& tensor, const char* name) {
  require(tensor.dims == 1 && (tensor.type == ElementType::kI32 || tensor.type == ElementType::kI64), name, tensor,
          "a vector of int32 or int64");
}

inline int64_t index_at(const TensorView& tensor, int64_t i) {
  const int64_t at = i * tensor.stride(0);
  return tensor.type == ElementType::kI32 ? tensor.as<int32_t>()[at] : tensor.as<int64_t>()[at];
}

// `offset` in elements.
inline float float_at(const TensorView& tensor, int64_t offset) {
  if (tensor.type == ElementType::kF32) return tensor.as<float>()[offset];
  const uint16_t bits = tensor.as<uint16_t>()[offset];
  return tensor.type == ElementType::kBf16 ? from_bf16(bits) : from_f16(bits);
}

inline uint8_t* address(const TensorView& tensor, int64_t offset) {
  return tensor.bytes() + offset * static_cast<int64_t>(bytes_of(tensor.type));
}

// Multiply-adds below which one thread is done before others have woken up (1-3 us).
constexpr int64_t kWorthSharing = 1 << 16;

// job(piece) for every piece; `work`: multiply-adds of all together.
template <class Job>
void share_out(Engine& engine, int pieces, int64_t work, const Job& job) {
  if (pieces > 1 && work >= kWorthSharing) {
    engine.pools().for_each(pieces, [&](const Worker&, int piece) { job(piece); });
  } else {
    for (int piece = 0; piece < pieces; ++piece) job(piece);
  }
}

}  // namespace kt
