// AVX512-BF16: activations are rows of bf16, read in pairs.

struct Avx512DotBf16 : Avx512 {
  using Element = uint16_t;
  using Weights = __m512i;
  // 12 tokens x 32 rows = 24 accumulators; 14 reached the same share of peak in the prototype and leave no register
  // for a decode (Zen 5, 2026-11-21: 95-98 % of the VDPBF16PS peak for both).
  static constexpr int kTileTokens = 12;
  static constexpr int kTileVecs = 2;
  static constexpr int kPairTokens = 4;
  static constexpr int kWideTokens = 4;

  static inline Weights weights(const uint8_t* p) { return _mm512_load_si512(p); }
  static inline Vec dot(Vec acc, const Weights& w, const uint16_t* a) {
    int pair;
    __builtin_memcpy(&pair, a, sizeof(pair));
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
  }
  static inline void store_activation(Vec v, Element* p) { to_bf16(v, p); }
};
