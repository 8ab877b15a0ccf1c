// Blocks of 256 columns whose codes are -1, 0 and 1, with one scale. Included by block_types-inl.h.

template <int kGroups>
static inline void one_scale(float d, float (&scale)[kGroups], float (&low)[kGroups]) {
  for (int g = 0; g < kGroups; ++g) {
    scale[g] = d;
    low[g] = 0;
  }
}

// | 48 bytes of five columns | 4 bytes of four | d |  (q - 1) * d
// A byte b is the fraction b / 256 in base 3: digit n is (b * 3^n mod 256) * 3 / 256. Digit n of byte j is column
// 32 n + j for the first 32 bytes, 160 + 16 n + j for the next 16, 240 + 4 n + j for the last.
struct TQ1_0 {
  static constexpr const char* kName = "TQ1_0";
  static constexpr int kId = 34, kColumns = 256, kBytes = 54, kGroup = 32;
  static constexpr bool kLow = false, kRepacked = false;

  template <int kCount, int kDigits>
  static inline __attribute__((always_inline)) void digits(const uint8_t* from, int8_t* codes) {
    constexpr int kPowers[] = {1, 3, 9, 27, 81};
    for (int n = 0; n < kDigits; ++n) {
      for (int j = 0; j < kCount; ++j) {
        const uint8_t rest = static_cast<uint8_t>(from[j] * kPowers[n]);
        codes[n * kCount + j] = static_cast<int8_t>((static_cast<uint16_t>(rest * 3) >> 8) - 1);
      }
    }
  }
  static inline void read(const uint8_t* block, kt::BlockValues<256, 8>& values) {
    digits<32, 5>(block, values.codes);
    digits<16, 5>(block + 32, values.codes + 160);
    digits<4, 4>(block + 48, values.codes + 240);
    one_scale(half_at(block + 52), values.scale, values.low);
  }
};

// | 64 bytes as in Q2_K | d |  (q - 1) * d; a fourth code, 3, means 2
struct TQ2_0 {
  static constexpr const char* kName = "TQ2_0";
  static constexpr int kId = 35, kColumns = 256, kBytes = 66, kGroup = 32;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, kt::BlockValues<256, 8>& values) {
    int8_t* codes = values.codes;
    const uint8_t* from = block;
    for (int h = 0; h < 2; ++h, from += 32) {
      for (int s = 0; s < 4; ++s, codes += 32) {
        for (int j = 0; j < 32; ++j) codes[j] = static_cast<int8_t>((from[j] >> (2 * s) & 3) - 1);
      }
    }
    one_scale(half_at(block + 64), values.scale, values.low);
  }
};
