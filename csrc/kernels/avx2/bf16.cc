// BF16 weights on AVX2 + FMA: each pair is widened to two fp32 vectors; activations are fp32.
#include <immintrin.h>

#include "kernels/bf16_sets.h"

namespace {
#include "kernels/avx2/ops-inl.h"

struct Ops : Avx2 {
  // 6 tokens x 16 rows = 12 accumulators of the 16 registers; for up to 3 tokens x 32 rows, also 12.
  static constexpr int kTileTokens = 6;
  static constexpr int kTileVecs = 2;
  static constexpr int kPairTokens = 1;
  static constexpr int kWideTokens = 3;

  static inline Weights weights(const uint8_t* p) {
    const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
  static inline Vec dot(Vec acc, const Weights& w, const float* a) {
    acc = _mm256_fmadd_ps(w.even, _mm256_broadcast_ss(a), acc);
    return _mm256_fmadd_ps(w.odd, _mm256_broadcast_ss(a + 1), acc);
  }
};

#include "kernels/gemm-inl.h"
#include "kernels/rows-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kBf16Avx2 = make_kernel_set<Ops>("bf16.avx2", PanelGemm<Ops>::run);
