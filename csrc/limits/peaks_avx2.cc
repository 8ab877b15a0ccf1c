#include <immintrin.h>

#include "limits/peaks.h"

namespace {
#include "limits/peak-inl.h"

constexpr int kChains = 12;
// More than 6 chains do not fit in 16 registers. (Zen 4, 1 thread, 2026-11-30: 3 / 4 / 6 chains reach 2.2 / 2.45 / 2.85
// times the fp32 peak.)
constexpr int kShortChains = 6;
constexpr int kProducts = 8;  // 2 * 8 * 15 * 127 < 2^15

struct Fma {
  using Vec = __m256;
  using Operand = __m256;
  static inline Vec start(int i) { return _mm256_set1_ps(static_cast<float>(i)); }
  static inline Operand left() { return _mm256_set1_ps(0.999f); }
  static inline Operand right() { return _mm256_set1_ps(1e-3f); }
  static inline Vec step(Vec acc, Operand a, Operand b) { return _mm256_fmadd_ps(acc, a, b); }
  static inline Vec combine(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static inline float first(Vec v) { return _mm256_cvtss_f32(v); }
};

// What an AVX2 CPU without VNNI does for four products of codes of 8 bits, of which two fill 16 bits: multiply-add to
// 16 bits, to 32 bits, add.
struct Int8 {
  using Vec = __m256i;
  using Operand = __m256i;
  static inline Vec start(int i) { return _mm256_set1_epi8(static_cast<char>(i + 1)); }
  static inline Operand left() { return _mm256_set1_epi8(3); }
  static inline Operand right() { return _mm256_set1_epi16(1); }
  static inline Vec step(Vec acc, Operand a, Operand b) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(a, acc), b));
  }
  static inline Vec combine(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static inline float first(Vec v) { return static_cast<float>(_mm256_extract_epi32(v, 0)); }
};

struct Sums16 {
  using Vec = __m256i;
  static inline Vec bytes(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
  static inline Vec products(Vec codes, const int8_t* a) {
    return _mm256_maddubs_epi16(codes, _mm256_load_si256(reinterpret_cast<const Vec*>(a)));
  }
  static inline Vec add16(Vec a, Vec b) { return _mm256_add_epi16(a, b); }
  static inline Vec add32(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static inline Vec widened(Vec sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
  static inline float first(Vec v) { return static_cast<float>(_mm256_extract_epi32(v, 0)); }
};

uint64_t read(const uint8_t* data, size_t bytes) {
  __m256i sum[4] = {};
  for (size_t i = 0; i < bytes; i += 256) {
    for (int line = 0; line < 4; ++line) {
      const __m256i* p = reinterpret_cast<const __m256i*>(data + i + 64 * line);
      // The L2 prefetcher stops at 4 KiB pages; 4 KiB ahead keeps the queue to memory full across them.
      _mm_prefetch(reinterpret_cast<const char*>(p) + 4096, _MM_HINT_T1);
      sum[line] = _mm256_add_epi64(sum[line], _mm256_add_epi64(_mm256_load_si256(p), _mm256_load_si256(p + 1)));
    }
  }
  const __m256i all = _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
  return static_cast<uint64_t>(_mm256_extract_epi64(all, 0)) + static_cast<uint64_t>(_mm256_extract_epi64(all, 2));
}

}  // namespace

constexpr kt::Peak kt::kPeakF32Avx2 = {"f32 fma, avx2", kChains * 8 * 2, run_peak<Fma, kChains>};
constexpr kt::Peak kt::kPeakInt8Avx2 = {"int8 madd, avx2", kChains * 32 * 2, run_peak<Int8, kChains>};
constexpr kt::Peak kt::kPeakInt4Avx2 = {"int8 madd, sums in 16 bits, avx2", kShortChains * kProducts * 32 * 2,
                                        run_sums_in_16_bits<Sums16, kShortChains, kProducts>};
uint64_t (*const kt::kReadAvx2)(const uint8_t*, size_t) = read;
