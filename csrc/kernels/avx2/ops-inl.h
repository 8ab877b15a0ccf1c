// AVX2 + FMA + F16C vectors of 8 fp32 (see gemm-inl.h and rows-inl.h for the contract).

struct Avx2 {
  using Vec = __m256;
  using Element = float;
  using Pairs = __m256i;  // 8 rows x one pair of bf16
  struct Weights {
    __m256 even, odd;
  };
  using Sum = Vec;
  static constexpr kt::Activation kActivation = kt::Activation::kF32;
  static constexpr bool kInteger = false;
  static constexpr int kDotK = 2;
  static constexpr int kLanes = 8;
  // 6 tokens x 16 rows = 12 accumulators of the 16 registers.
  static constexpr int kTileTokens = 6;
  static constexpr int kTileVecs = 2;
  static constexpr int kShortStepTokens = 0;
  static constexpr int kSumTokens = 6;
  // Two leave too few registers: Zen 4, 1 thread, 64 tokens, Q4_0, 2026-11-30: 71 % of the int8 peak, with two 55 %.
  static constexpr int kDotsAtOnce = 1;
  static constexpr int kFewTokens = 2;
  static constexpr int kFewVectors = 8;

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

  // (1, 0, 3, 2, ...), and which lanes of two vectors are equal.
  static inline Vec swap_pairs(Vec v) { return _mm256_permute_ps(v, 0xB1); }
  static inline uint32_t equal_lanes(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
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
  static inline Weights widen(Pairs pairs) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
  // Columns kFirst and kFirst + 1 of words of four signed bytes.
  template <int kFirst>
  static inline Weights from_int8(Pairs words) {
    const auto column = [&](int shift) __attribute__((always_inline)) {
      return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, shift), 24));
    };
    return {column(24 - 8 * kFirst), column(16 - 8 * kFirst)};
  }
  static constexpr bool kWidens = true;
  static inline Weights load_weights(const uint8_t* p) {
    const float* f = reinterpret_cast<const float*>(p);
    return {_mm256_load_ps(f), _mm256_load_ps(f + 8)};
  }
  static inline void store_weights(uint8_t* p, const Weights& w) {
    float* f = reinterpret_cast<float*>(p);
    _mm256_store_ps(f, w.even);
    _mm256_store_ps(f + 8, w.odd);
  }
  // 12 sums, the weights of a pair and an activation are a register too many. (Zen 4, 1 thread, shape S, 1024 tokens,
  // 2026-11-30: BF16 50 % of the fp32 peak by pairs and 63 % so, FP8 45 and 66 %.)
  static constexpr bool kByColumn = true;
  template <int kOfPair>
  static inline Vec load_column(const uint8_t* p) {
    return _mm256_load_ps(reinterpret_cast<const float*>(p) + 8 * kOfPair);
  }
  static inline Vec dot(Vec acc, const Weights& w, const float* a) {
    acc = _mm256_fmadd_ps(w.even, _mm256_broadcast_ss(a), acc);
    return _mm256_fmadd_ps(w.odd, _mm256_broadcast_ss(a + 1), acc);
  }

  // Words of eight 4-bit codes (formats/code4.h) -> four pairs of bf16, by their low and their high bytes.
  struct NibbleTable {
    __m256i low, high;
  };
  static inline NibbleTable nibble_table(const uint16_t* values) {
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    const __m256i low_bytes = _mm256_and_si256(all, _mm256_set1_epi16(0x00FF));
    const __m256i high_bytes = _mm256_srli_epi16(all, 8);
    const __m256i low = _mm256_permute4x64_epi64(_mm256_packus_epi16(low_bytes, low_bytes), 0x88);
    const __m256i high = _mm256_permute4x64_epi64(_mm256_packus_epi16(high_bytes, high_bytes), 0x88);
    return {low, high};
  }
  static inline void look_up_nibbles(const NibbleTable& t, Pairs words, Pairs (&pairs)[4]) {
    // Bytes of a word: columns 0|2, 4|6, 1|3, 5|7 in low|high nibbles. First the bytes with columns 0..3 of the lane's
    // four rows, then those with columns 4..7.
    const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                           0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i bytes = _mm256_shuffle_epi8(words, order);
    const __m256i low_nibbles = _mm256_and_si256(bytes, nibble);
    const __m256i high_nibbles = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    const __m256i a_low = _mm256_shuffle_epi8(t.low, low_nibbles), a_high = _mm256_shuffle_epi8(t.high, low_nibbles);
    const __m256i b_low = _mm256_shuffle_epi8(t.low, high_nibbles), b_high = _mm256_shuffle_epi8(t.high, high_nibbles);
    pairs[0] = _mm256_unpacklo_epi8(a_low, a_high);
    pairs[1] = _mm256_unpacklo_epi8(b_low, b_high);
    pairs[2] = _mm256_unpackhi_epi8(a_low, a_high);
    pairs[3] = _mm256_unpackhi_epi8(b_low, b_high);
  }

  // Bytes, and their nibbles.
  static inline __m256i bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Vec from_bytes(const uint8_t* p) { return _mm256_cvtepi32_ps(bytes(p)); }
  static inline Vec from_signed_bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static inline Vec from_low_nibbles(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(bytes(p), _mm256_set1_epi32(15)));
  }
  static inline Vec from_high_nibbles(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_srli_epi32(bytes(p), 4)); }

  // 2^(b-127); b = 0 is a denormal, 0x00400000.
  static inline Vec from_e8m0(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(bytes(p), 23), _mm256_set1_epi32(0x00400000)));
  }
  // 2^-8 of the value: as IEEE half, whose exponent has one bit more, e4m3 reads that much smaller. NaN becomes a
  // number (PanelHeader::nan_rows takes care of it).
  static inline Vec from_e4m3(const uint8_t* p) {
    const __m128i codes = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16(static_cast<short>(0xBF80))));
  }
};
