// Int8 activations on AVX2: two ways to sum the products of bytes. Each is an Ops (gemm-inl.h) with, beyond that:
//   Bytes, load_bytes, low_nibbles, high_nibbles, shifted, bits, with_bits, byte_table, look_up
//   unsigned_weights, signed_weights   bytes that are codes + offset, or two's complement codes, as Weights
//   Offset, offset(int), open          a step's sum before its first product: -offset * (sum of the activations)

struct Avx2Bytes : Avx2 {
  using Element = int8_t;
  using Bytes = __m256i;
  // What sums are, by their lanes: as __m256i they would be copied around every instruction that wants such lanes (GCC
  // 12).
  using Ints = int __attribute__((vector_size(32)));
  using Shorts = short __attribute__((vector_size(32)));
  static constexpr kt::Activation kActivation = kt::Activation::kInt8;
  static constexpr bool kInteger = true;
  static constexpr int kDotK = 4;
  static constexpr bool kWidens = false;
  static constexpr bool kByColumn = false;

  static inline Bytes load_bytes(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static inline Bytes low_nibbles(Bytes words) { return _mm256_and_si256(words, _mm256_set1_epi8(15)); }
  static inline Bytes high_nibbles(Bytes words) { return low_nibbles(_mm256_srli_epi16(words, 4)); }
  // Bits of bytes, moved down within words of 16 bits (kDown < 0: up): bits that come from other bytes are the caller's
  // to mask.
  template <int kDown>
  static inline Bytes shifted(Bytes words) {
    if constexpr (kDown > 0) return _mm256_srli_epi16(words, kDown);
    if constexpr (kDown < 0) return _mm256_slli_epi16(words, -kDown);
    return words;
  }
  template <int kMask>
  static inline Bytes bits(Bytes bytes) {
    return _mm256_and_si256(bytes, _mm256_set1_epi8(kMask));
  }
  template <int kMask>
  static inline Bytes with_bits(Bytes bytes, Bytes more) {
    return _mm256_or_si256(bytes, bits<kMask>(more));
  }
  static inline Bytes byte_table(const uint8_t* values) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  }
  static inline Bytes look_up(Bytes table, Bytes nibbles) { return _mm256_shuffle_epi8(table, nibbles); }
  static inline __m256i four(const int8_t* a) {
    int word;
    __builtin_memcpy(&word, a, sizeof(word));
    return _mm256_set1_epi32(word);
  }
  static inline Vec from_int32(__m256i sums) { return _mm256_cvtepi32_ps(sums); }
  // Pairs of 16-bit lanes.
  static inline __m256i added_pairs(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
};

// Codes of 4 bits: a whole step is summed in 16 bits, which PanelLayout::int8_step_k is small enough for. Sums may wrap
// around on the way, and do not once the offset is out.
struct Avx2ShortSums : Avx2Bytes {
  using Sum = Shorts;
  using Weights = __m256i;

  static inline Weights load_weights(const uint8_t* p) { return load_bytes(p); }
  static inline void store_weights(uint8_t* p, Weights w) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), w); }
  static inline Weights unsigned_weights(Bytes bytes) { return bytes; }
  static inline Sum open(const kt::RowGroup* group) {
    int word;
    __builtin_memcpy(&word, group->opens, sizeof(word));
    return (Sum)_mm256_set1_epi32(word);
  }
  // At most 24 * 127 * 2: VPMADDUBSW does not saturate.
  static inline Sum dot(Sum sum, Weights w, const int8_t* a) { return sum + (Sum)_mm256_maddubs_epi16(w, four(a)); }
  static inline Vec close(Sum sum) { return from_int32(added_pairs((__m256i)sum)); }
};

// Codes of 8 bits: VPMADDUBSW wants one factor without a sign, |w|, so the other takes it: at most 128 * 127 * 2, and
// no two such results fit 16 bits.
struct Avx2LongSums : Avx2Bytes {
  using Sum = Ints;
  using Weights = __m256i;

  static inline Weights load_weights(const uint8_t* p) { return load_bytes(p); }
  static inline void store_weights(uint8_t* p, Weights w) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), w); }
  static inline Weights signed_weights(Bytes bytes) { return bytes; }
  static inline Sum open(const kt::RowGroup*) { return Sum{}; }
  static inline Sum dot(Sum sum, Weights w, const int8_t* a) {
    const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four(a), w));
    return sum + (Sum)added_pairs(products);
  }
  static inline Vec close(Sum sum) { return from_int32((__m256i)sum); }
};
