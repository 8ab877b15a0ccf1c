#include <immintrin.h>

#include "limits/peaks.h"

namespace {
#include "limits/peak-inl.h"

constexpr int kChains = 16;
constexpr int kShortChains = 6;
constexpr int kProducts = 8;  // 2 * 8 * 15 * 127 < 2^15

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

// As in peaks_avx2.cc, for CPUs with AVX512 and without VNNI.
struct Int8 {
  using Vec = __m512i;
  using Operand = __m512i;
  static inline Vec start(int i) { return _mm512_set1_epi8(static_cast<char>(i + 1)); }
  static inline Operand left() { return _mm512_set1_epi8(3); }
  static inline Operand right() { return _mm512_set1_epi16(1); }
  static inline Vec step(Vec acc, Operand a, Operand b) {
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(a, acc), b));
  }
  static inline Vec combine(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static inline float first(Vec v) { return static_cast<float>(_mm512_cvtsi512_si32(v)); }
};

struct Sums16 {
  using Vec = __m512i;
  static inline Vec bytes(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
  static inline Vec products(Vec codes, const int8_t* a) {
    return _mm512_maddubs_epi16(codes, _mm512_load_si512(reinterpret_cast<const Vec*>(a)));
  }
  static inline Vec add16(Vec a, Vec b) { return _mm512_add_epi16(a, b); }
  static inline Vec add32(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static inline Vec widened(Vec sums) { return _mm512_madd_epi16(sums, _mm512_set1_epi16(1)); }
  static inline float first(Vec v) { return static_cast<float>(_mm512_cvtsi512_si32(v)); }
};

}  // namespace

constexpr kt::Peak kt::kPeakF32Avx512 = {"f32 fma, avx512", kChains * 16 * 2, run_peak<Fma, kChains>};
constexpr kt::Peak kt::kPeakInt8Avx512 = {"int8 madd, avx512", kChains * 64 * 2, run_peak<Int8, kChains>};
constexpr kt::Peak kt::kPeakInt4Avx512 = {"int8 madd, sums in 16 bits, avx512", kShortChains * kProducts * 64 * 2,
                                          run_sums_in_16_bits<Sums16, kShortChains, kProducts>};
