#include <immintrin.h>

#include "limits/peaks.h"

namespace {
#include "limits/peak-inl.h"

constexpr int kChains = 12;

struct Dot {
  using Vec = __m256i;
  using Operand = __m256i;
  static inline Vec start(int i) { return _mm256_set1_epi32(i); }
  static inline Operand left() { return _mm256_set1_epi8(3); }
  static inline Operand right() { return _mm256_set1_epi8(1); }
  static inline Vec step(Vec acc, Operand a, Operand b) { return _mm256_dpbusd_avx_epi32(acc, a, b); }
  static inline Vec combine(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static inline float first(Vec v) { return static_cast<float>(_mm256_extract_epi32(v, 0)); }
};

}  // namespace

constexpr kt::Peak kt::kPeakInt8AvxVnni = {"int8 dot, avx_vnni", kChains * 32 * 2, run_peak<Dot, kChains>};
