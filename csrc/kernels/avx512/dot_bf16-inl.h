// AVX512-BF16: activations are rows of bf16, read in pairs; weights are multiplied as they are.

struct Avx512DotBf16 : Avx512 {
  using Element = uint16_t;
  using Weights = __m512i;
  static constexpr kt::Activation kActivation = kt::Activation::kBf16;
  // 7 tokens leave GCC 12 one register short, and it reloads weights for every product.
  static constexpr int kShortStepTokens = 6;

  static constexpr bool kWidens = false;
  static inline Weights widen(Pairs pairs) { return pairs; }
  template <int kFirst>
  static inline Weights from_int8(Pairs words) {
    const Avx512::Weights wide = Avx512::from_int8<kFirst>(words);  // as bf16 these are exact: the low halves are zero
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(wide.even), 16), _mm512_castps_si512(wide.odd));
  }
  static inline Weights load_weights(const uint8_t* p) { return _mm512_load_si512(p); }
  static inline void store_weights(uint8_t* p, const Weights& w) { _mm512_store_si512(p, w); }
  static inline Vec dot(Vec acc, const Weights& w, const uint16_t* a) {
    int pair;
    __builtin_memcpy(&pair, a, sizeof(pair));
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
  }
  static inline void store_activation(Vec v, Element* p) { to_bf16(v, p); }
};
