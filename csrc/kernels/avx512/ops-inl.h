// AVX512 (F, BW, VL, DQ) vectors of 16 fp32 (see gemm-inl.h and rows-inl.h for the contract).

struct Avx512 {
  using Vec = __m512;
  using Element = float;
  using Pairs = __m512i;  // 16 rows x one pair of bf16
  struct Weights {
    __m512 even, odd;
  };
  using Sum = Vec;
  static constexpr kt::Activation kActivation = kt::Activation::kF32;
  static constexpr bool kInteger = false;
  static constexpr int kDotK = 2;
  static constexpr int kLanes = 16;
  // 12 tokens x 32 rows = 24 accumulators, which leaves 8 registers for weights and activations; 14 tokens reached the
  // same share of peak in the prototype (Zen 5, 2026-11-21: 95-98 % of the VDPBF16PS peak for both).
  static constexpr int kTileTokens = 12;
  static constexpr int kTileVecs = 2;
  static constexpr int kShortStepTokens = 0;
  // Zen 4, AVX512-VNNI, 1 thread, 60 tokens, 2026-11-30, tiles of 4 / 5 / 6 tokens: Q4_0 68 / 71 / 46 % of the int8
  // peak, Q6_K 54 / 61 / 43 %; GCC 12 keeps the sums of 6 in memory.
  static constexpr int kSumTokens = 5;
  static constexpr int kDotsAtOnce = 1;
  static constexpr int kFewTokens = 4;
  // (Zen 4, 2 threads, 2026-11-30, cold Q8_0: 8 sums 87 % of the read bandwidth, 4 sums 75 %, 16 no more; Q4_K 44 GB/s
  // a core from L2 instead of 42. Zen 5, 2026-11-21, when codes were fetched into L1: RAWINT4 95 % with 4, 62 %
  // with 8.)
  static constexpr int kFewVectors = 8;

  static inline Vec zero() { return _mm512_setzero_ps(); }
  static inline Vec set(float x) { return _mm512_set1_ps(x); }
  static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static inline void store_to(Vec v, float* p) { _mm512_storeu_ps(p, v); }
  static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static inline Vec round_even(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static inline Vec pow2(Vec n) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
  }

  // (1, 0, 3, 2, ...), and which lanes of two vectors are equal.
  static inline Vec swap_pairs(Vec v) { return _mm512_permute_ps(v, 0xB1); }
  static inline uint32_t equal_lanes(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }

  // bf16 bits of each lane in the low half of a 32-bit lane: round to nearest even, NaN stays a (quiet) NaN.
  // (VCVTNEPS2BF16 would flush denormals.)
  static inline __m512i bf16_bits(Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
  }
  static inline Vec round_bf16(Vec v) { return _mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(v), 16)); }
  static inline Vec from_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static inline void to_bf16(Vec v, uint16_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_bits(v)));
  }
  static inline Vec from_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline void to_f16(Vec v, uint16_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static inline void store_activation(Vec v, Element* p) { _mm512_storeu_ps(p, v); }

  static inline Pairs load_pairs(const uint8_t* p) { return _mm512_load_si512(p); }
  static inline Weights widen(Pairs pairs) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
  // Columns kFirst and kFirst + 1 of words of four signed bytes.
  template <int kFirst>
  static inline Weights from_int8(Pairs words) {
    const auto column = [&](int shift) __attribute__((always_inline)) {
      return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, shift), 24));
    };
    return {column(24 - 8 * kFirst), column(16 - 8 * kFirst)};
  }
  static constexpr bool kWidens = true;
  static constexpr bool kByColumn = false;
  static inline Weights load_weights(const uint8_t* p) {
    const float* f = reinterpret_cast<const float*>(p);
    return {_mm512_load_ps(f), _mm512_load_ps(f + 16)};
  }
  static inline void store_weights(uint8_t* p, const Weights& w) {
    float* f = reinterpret_cast<float*>(p);
    _mm512_store_ps(f, w.even);
    _mm512_store_ps(f + 16, w.odd);
  }
  static inline Vec dot(Vec acc, const Weights& w, const float* a) {
    acc = _mm512_fmadd_ps(w.even, _mm512_set1_ps(a[0]), acc);
    return _mm512_fmadd_ps(w.odd, _mm512_set1_ps(a[1]), acc);
  }

  // Words of eight 4-bit codes (formats/code4.h) -> four pairs of bf16. VPERMW looks up in 32 values by the low five
  // bits of each half: the table stands there twice, so that the fifth bit, the next code's, does not matter.
  using NibbleTable = __m512i;
  static inline NibbleTable nibble_table(const uint16_t* values) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  }
  static inline void look_up_nibbles(NibbleTable values, Pairs words, Pairs (&pairs)[4]) {
    pairs[0] = _mm512_permutexvar_epi16(words, values);
    pairs[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), values);
    pairs[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), values);
    pairs[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), values);
  }

  // Bytes, and their nibbles.
  static inline __m512i bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Vec from_bytes(const uint8_t* p) { return _mm512_cvtepi32_ps(bytes(p)); }
  static inline Vec from_signed_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static inline Vec from_low_nibbles(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(bytes(p), _mm512_set1_epi32(15)));
  }
  static inline Vec from_high_nibbles(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_srli_epi32(bytes(p), 4)); }

  // 2^(b-127); b = 0 is a denormal, 0x00400000.
  static inline Vec from_e8m0(const uint8_t* p) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(bytes(p), 23), _mm512_set1_epi32(0x00400000)));
  }
  // 2^-8 of the value: as IEEE half, whose exponent has one bit more, e4m3 reads that much smaller. NaN becomes a
  // number (PanelHeader::nan_rows takes care of it).
  static inline Vec from_e4m3(const uint8_t* p) {
    const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtph_ps(
        _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(static_cast<short>(0xBF80))));
  }
};
