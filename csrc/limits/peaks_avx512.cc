#include <immintrin.h>

#include "limits/peaks.h"

namespace {
#include "limits/peak-inl.h"

constexpr int kChains = 16;

struct Fma {
  using Vec = __m512;
  using Operand = __m512;
  static inline Vec start(int i) { return _mm512_set1_ps(static_cast<float>(i)); }
  static inline Operand left() { return _mm512_set1_ps(0.999f); }
  static inline Operand right() { return _mm512_set1_ps(1e-3f); }
  static inline Vec step(Vec acc, Operand a, Operand b) { return _mm512_fmadd_ps(acc, a, b); }
  static inline Vec combine(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static inline float first(Vec v) { return _mm512_cvtss_f32(v); }
};

}  // namespace

constexpr kt::Peak kt::kPeakF32Avx512 = {"f32 fma, avx512", kChains * 16 * 2, run_peak<Fma, kChains>};
