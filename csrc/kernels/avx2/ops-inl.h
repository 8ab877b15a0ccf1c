// AVX2 + FMA + F16C vectors of 8 fp32 (see gemm-inl.h and rows-inl.h for the contract).

struct Avx2 {
  using Vec = __m256;
  using Element = float;
  using Pairs = __m256i;  // 8 rows x one pair of bf16
  using Bytes = __m256i;
  struct Weights {
    __m256 even, odd;
  };
  static constexpr int kLanes = 8;
  // 6 tokens x 16 rows = 12 accumulators of the 16 registers; for up to 3 tokens x 32 rows, also 12.
  static constexpr int kTileTokens = 6;
  static constexpr int kTileVecs = 2;
  static constexpr int kPairTokens = 1;
  static constexpr int kWideTokens = 3;
  static constexpr int kScaledPairTokens = 1;
  static constexpr int kScaledWideTokens = 2;

  static inline Vec zero() { return _mm256_setzero_ps(); }
  static inline Vec set(float x) { return _mm256_set1_ps(x); }
  static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static inline void store_to(Vec v, float* p) { _mm256_storeu_ps(p, v); }
  static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static inline Vec round_even(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static inline Vec pow2(Vec n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }

  // bf16 bits of each lane in the low half of a 32-bit lane: round to nearest even, NaN stays a (quiet) NaN.
  static inline __m256i bf16_bits(Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  }
  static inline Vec round_bf16(Vec v) { return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(v), 16)); }
  static inline Vec from_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static inline void to_bf16(Vec v, uint16_t* p) {
    const __m256i bits = bf16_bits(v);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static inline Vec from_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline void to_f16(Vec v, uint16_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static inline void store_activation(Vec v, Element* p) { _mm256_storeu_ps(p, v); }

  static inline Pairs load_pairs(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static inline void store_pairs(uint8_t* p, Pairs v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
  static inline Weights widen(Pairs pairs) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
  static inline Vec dot(Vec acc, const Weights& w, const float* a) {
    acc = _mm256_fmadd_ps(w.even, _mm256_broadcast_ss(a), acc);
    return _mm256_fmadd_ps(w.odd, _mm256_broadcast_ss(a + 1), acc);
  }

  static inline Bytes load_bytes(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static inline Bytes table16(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Bytes set_bytes(char b) { return _mm256_set1_epi8(b); }
  static inline Bytes add_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
  static inline Bytes and_bits(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
  static inline Bytes xor_bits(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
  static inline Bytes shuffle_bytes(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
  static inline Bytes high_nibbles(Bytes b) { return and_bits(_mm256_srli_epi16(b, 4), set_bytes(15)); }
  static inline Bytes nibbles_up(Bytes b) { return _mm256_slli_epi16(b, 4); }
  static inline Bytes unpack_low(Bytes low, Bytes high) { return _mm256_unpacklo_epi8(low, high); }
  static inline Bytes unpack_high(Bytes low, Bytes high) { return _mm256_unpackhi_epi8(low, high); }

  // 2^(b-127); b = 0 is a denormal, 0x00400000.
  static inline Vec from_e8m0(const uint8_t* p) {
    const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(b, 23), _mm256_set1_epi32(0x00400000)));
  }
  // 2^-8 of the value: as IEEE half, whose exponent has one bit more, e4m3 reads that much smaller. NaN stays NaN.
  static inline Vec from_e4m3(const uint8_t* p) {
    const __m128i codes = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i half = _mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16(static_cast<short>(0xBF80)));
    const __m128i nan = _mm_set1_epi16(0x3F80);
    return _mm256_cvtph_ps(_mm_or_si128(half, _mm_cmpeq_epi16(_mm_and_si128(half, nan), nan)));
  }
};
