// BF16 weights on AVX512 without the BF16 extension: each pair is widened to two fp32 vectors; activations are fp32.
#include <immintrin.h>

#include "kernels/bf16_sets.h"

namespace {
#include "kernels/avx512/ops-inl.h"

struct Ops : Avx512 {
  // 12 tokens x 32 rows = 24 accumulators, 4 registers of widened weights; activations are broadcast from memory.
  static constexpr int kTileTokens = 12;
  static constexpr int kTileVecs = 2;
  static constexpr int kPairTokens = 4;
  static constexpr int kWideTokens = 4;

  static inline Weights weights(const uint8_t* p) {
    const __m512i pairs = _mm512_load_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
  static inline Vec dot(Vec acc, const Weights& w, const float* a) {
    acc = _mm512_fmadd_ps(w.even, _mm512_set1_ps(a[0]), acc);
    return _mm512_fmadd_ps(w.odd, _mm512_set1_ps(a[1]), acc);
  }
};

#include "kernels/gemm-inl.h"
#include "kernels/rows-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kBf16Avx512 = make_kernel_set<Ops>("bf16.avx512", PanelGemm<Ops>::run);
