// Int8 activations on AVX512-VNNI: VPDPBUSD adds the products of four columns to a 32-bit sum at once. Weights are
// bytes without a sign.

struct Avx512Vnni : Avx512Bytes {
  using Sum = Ints;
  using Weights = __m512i;
  // Zen 4, 1 thread, 60 tokens, steps of 32, 2026-11-30: 329 Gop/s, with totals in memory 240.
  static constexpr int kShortStepTokens = 6;
  // Zen 4, 1 thread, 60 tokens, 2026-11-30: Q4_0 75 % of the int8 peak, with one 73; Q6_K 66, with one 65.
  static constexpr int kDotsAtOnce = 2;

  static inline Weights load_weights(const uint8_t* p) { return load_bytes(p); }
  static inline void store_weights(uint8_t* p, Weights w) { _mm512_store_si512(p, w); }
  static inline Weights unsigned_weights(Bytes bytes) { return bytes; }
  static inline Weights signed_weights(Bytes bytes) {
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(kt::kSignedOffset)));
  }
  static inline Sum open(const kt::RowGroup* group) { return (Sum)_mm512_set1_epi32(group->open); }
  static inline Sum dot(Sum sum, Weights w, const int8_t* a) {
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, w, four(a));
  }
  static inline Vec close(Sum sum) { return from_int32((__m512i)sum); }
};
