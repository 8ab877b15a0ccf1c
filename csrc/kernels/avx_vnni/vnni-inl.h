// Int8 activations on AVX-VNNI: VPDPBUSD adds the products of four columns to a 32-bit sum at once. Weights are bytes
// without a sign.

struct AvxVnni : Avx2Bytes {
  using Sum = Ints;
  using Weights = __m256i;

  static inline Weights load_weights(const uint8_t* p) { return load_bytes(p); }
  static inline void store_weights(uint8_t* p, Weights w) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), w); }
  static inline Weights unsigned_weights(Bytes bytes) { return bytes; }
  static inline Weights signed_weights(Bytes bytes) {
    return _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(kt::kSignedOffset)));
  }
  static inline Sum open(const kt::RowGroup* group) { return (Sum)_mm256_set1_epi32(group->open); }
  static inline Sum dot(Sum sum, Weights w, const int8_t* a) {
    return (Sum)_mm256_dpbusd_avx_epi32((__m256i)sum, w, four(a));
  }
  static inline Vec close(Sum sum) { return from_int32((__m256i)sum); }
};
