#include <immintrin.h>

#include "limits/peaks.h"

namespace {
#include "limits/peak-inl.h"

constexpr int kChains = 16;

struct Dot {
  using Vec = __m512;
  using Operand = __m512i;
  static inline Vec start(int i) { return _mm512_set1_ps(static_cast<float>(i)); }
  static inline Operand left() { return _mm512_set1_epi16(0x3F80); }   // 1.0
  static inline Operand right() { return _mm512_set1_epi16(0x3A00); }  // 2^-11
  static inline Vec step(Vec acc, Operand a, Operand b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
  static inline Vec combine(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static inline float first(Vec v) { return _mm512_cvtss_f32(v); }
};

}  // namespace

constexpr kt::Peak kt::kPeakBf16Avx512 = {"bf16 dot, avx512_bf16", kChains * 32 * 2, run_peak<Dot, kChains>};
