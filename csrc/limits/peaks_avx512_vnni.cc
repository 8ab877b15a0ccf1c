#include <immintrin.h>

#include "limits/peaks.h"

namespace {
#include "limits/peak-inl.h"

constexpr int kChains = 16;

struct Dot {
  using Vec = __m512i;
  using Operand = __m512i;
  static inline Vec start(int i) { return _mm512_set1_epi32(i); }
  static inline Operand left() { return _mm512_set1_epi8(3); }
  static inline Operand right() { return _mm512_set1_epi8(1); }
  static inline Vec step(Vec acc, Operand a, Operand b) { return _mm512_dpbusd_epi32(acc, a, b); }
  static inline Vec combine(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static inline float first(Vec v) { return static_cast<float>(_mm512_cvtsi512_si32(v)); }
};

}  // namespace

constexpr kt::Peak kt::kPeakInt8Avx512Vnni = {"int8 dot, avx512_vnni", kChains * 64 * 2, run_peak<Dot, kChains>};
