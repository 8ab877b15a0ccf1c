// Blocks of 256 columns whose codes are -1, 0 and 1, with one scale. Included by block_types-inl.h.

static inline void one_scale(float d, float* scale) {
  for (int g = 0; g < 8; ++g) scale[g] = d;
}

// | 48 bytes of five columns | 4 bytes of four | d |  (q - 1) * d
// A byte b is the fraction b / 256 in base 3: digit n is (b * 3^n mod 256) * 3 / 256. Digit n of byte j is column
// 32 n + j for the first 32 bytes, 160 + 16 n + j for the next 16, 240 + 4 n + j for the last.
struct TQ1_0 {
  static constexpr const char* kName = "TQ1_0";
  static constexpr int kId = 34, kColumns = 256, kBytes = 54, kGroup = 32;
  static constexpr bool kLow = false, kRepacked = false;

  // kDigits x kCount codes: floor(3 b / 256) is 1 from 86 on and 2 from 171 on.
  template <class Vector, int kDigits, int kCount = sizeof(Vector)>
  static inline void digits(Vector fractions, int8_t* codes) {
    for (int n = 0; n < kDigits; ++n, fractions = fractions * 3) {
      const Vector code = -1 - (Vector)(fractions >= 86) - (Vector)(fractions >= 171);
      memcpy(codes + n * kCount, &code, kCount);
    }
  }
  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float*) {
    digits<Bytes32, 5>(word_at<Bytes32>(block), codes);
    digits<Bytes16, 5>(word_at<Bytes16>(block + 32), codes + 160);
    digits<Bytes16, 4, 4>((Bytes16)Words2{word_at<uint32_t>(block + 48)}, codes + 240);
    one_scale(half_at(block + 52), scale);
  }
};

// | 64 bytes as in Q2_K | d |  (q - 1) * d; a fourth code, 3, means 2
struct TQ2_0 {
  static constexpr const char* kName = "TQ2_0";
  static constexpr int kId = 35, kColumns = 256, kBytes = 66, kGroup = 32;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float*) {
    for (int h = 0; h < 2; ++h) two_bits(block + 32 * h, codes + 128 * h, 1);
    one_scale(half_at(block + 64), scale);
  }
};
