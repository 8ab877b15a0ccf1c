// Blocks of 256 columns whose codes are places in a grid of 8 or 4 columns. Included by block_types-inl.h.
//
// IQ2, IQ3: the grid has magnitudes, above 0, and signs stand apart. IQ1: a number is (grid + 1/8) or (grid - 1/8),
// here 8 * grid + 1 or - 1 with an eighth of the scale.

// Bytes above 0 with the signs of `mask`, 0xFF for minus: no byte carries into the next.
template <class Word>
static inline Word with_signs(Word magnitudes, Word mask) {
  return (magnitudes ^ mask) + (mask & static_cast<Word>(0x0101010101010101));
}

// Eight bytes plus `added` (in each byte): top bits apart, so that none carries into the next.
static inline uint64_t add_to_bytes(uint64_t bytes, uint64_t added) {
  constexpr uint64_t kTop = 0x8080808080808080;
  return ((bytes & ~kTop) + (added & ~kTop)) ^ ((bytes ^ added) & kTop);
}

// Nibbles as sixteen scales d * (1/2 + nibble) / 4 of 16 columns: IQ2_XS, IQ2_S.
static inline void nibble_scales(float d, const uint8_t* bytes, float* scale) {
  for (int g = 0; g < 16; ++g) {
    const int nibble = bytes[g / 2] >> (g % 2 * 4) & 15;
    scale[g] = d * (0.5f + static_cast<float>(nibble)) * 0.25f;
  }
}

// | d | 8 x (4 places, 4 x 7 bits of signs, 4 bits of scale) |
struct IQ2_XXS {
  static constexpr const char* kName = "IQ2_XXS";
  static constexpr int kId = 16, kColumns = 256, kBytes = 66, kGroup = 32;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float*) {
    const float d = half_at(block);
    for (int g = 0; g < 8; ++g) {
      const uint8_t* places = block + 2 + 8 * g;
      const uint32_t word = word_at<uint32_t>(places + 4);
      for (int i = 0; i < 4; ++i) {
        const uint64_t mask = kt::kEvenSignMasks.words[word >> (7 * i) & 127];
        put(codes + 32 * g + 8 * i, with_signs(kt::kIq2XxsGrid.words[places[i]], mask));
      }
      scale[g] = d * (0.5f + static_cast<float>(word >> 28)) * 0.25f;
    }
  }
};

// | d | 32 x (9 bits of place, 7 bits of signs) | 8 bytes of scales |
struct IQ2_XS {
  static constexpr const char* kName = "IQ2_XS";
  static constexpr int kId = 17, kColumns = 256, kBytes = 74, kGroup = 16;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float*) {
    for (int i = 0; i < 32; ++i) {
      const uint32_t word = word_at<uint16_t>(block + 2 + 2 * i);
      put(codes + 8 * i, with_signs(kt::kIq2XsGrid.words[word & 511], kt::kEvenSignMasks.words[word >> 9]));
    }
    nibble_scales(half_at(block), block + 66, scale);
  }
};

// | d | 32 places | 32 bytes of signs | 8 bytes of top bits of places | 8 bytes of scales |
struct IQ2_S {
  static constexpr const char* kName = "IQ2_S";
  static constexpr int kId = 22, kColumns = 256, kBytes = 82, kGroup = 16;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float*) {
    const uint8_t* places = block + 2;
    const uint8_t* signs = block + 34;
    const uint8_t* high = block + 66;
    for (int g = 0; g < 8; ++g, places += 4, signs += 4) {
      const uint32_t top = static_cast<uint32_t>(high[g]) << 8;
      for (int i = 0; i < 4; ++i) {
        const uint64_t grid = kt::kIq2SGrid.words[places[i] | (top >> (2 * i) & 0x300)];
        put(codes + 32 * g + 8 * i, with_signs(grid, kt::kSignMasks.words[signs[i]]));
      }
    }
    nibble_scales(half_at(block), block + 74, scale);
  }
};

// Two entries of four columns as eight.
static inline uint64_t joined(uint32_t first, uint32_t second) { return first | static_cast<uint64_t>(second) << 32; }

// | d | 64 places | 8 x (4 x 7 bits of signs, 4 bits of scale) |
struct IQ3_XXS {
  static constexpr const char* kName = "IQ3_XXS";
  static constexpr int kId = 18, kColumns = 256, kBytes = 98, kGroup = 32;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float*) {
    const float d = half_at(block);
    const uint8_t* places = block + 2;
    for (int g = 0; g < 8; ++g) {
      const uint32_t word = word_at<uint32_t>(block + 66 + 4 * g);
      for (int i = 0; i < 4; ++i, places += 2) {
        const uint64_t grid = joined(kt::kIq3XxsGrid.words[places[0]], kt::kIq3XxsGrid.words[places[1]]);
        put(codes + 32 * g + 8 * i, with_signs(grid, kt::kEvenSignMasks.words[word >> (7 * i) & 127]));
      }
      scale[g] = d * (0.5f + static_cast<float>(word >> 28)) * 0.5f;
    }
  }
};

// | d | 64 places | 8 bytes of top bits of places | 32 bytes of signs | 4 bytes of scales |
struct IQ3_S {
  static constexpr const char* kName = "IQ3_S";
  static constexpr int kId = 21, kColumns = 256, kBytes = 110, kGroup = 32;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float*) {
    const float d = half_at(block);
    const uint8_t* signs = block + 74;
    for (int g = 0; g < 8; ++g) {
      const uint8_t* places = block + 2 + 8 * g;
      const uint32_t high = static_cast<uint32_t>(block[66 + g]) << 8;
      for (int i = 0; i < 4; ++i) {
        const uint64_t grid = joined(kt::kIq3SGrid.words[places[2 * i] | (high >> (2 * i) & 256)],
                                     kt::kIq3SGrid.words[places[2 * i + 1] | (high >> (2 * i + 1) & 256)]);
        put(codes + 32 * g + 8 * i, with_signs(grid, kt::kSignMasks.words[signs[4 * g + i]]));
      }
      const int nibble = block[106 + g / 2] >> (g % 2 * 4) & 15;
      scale[g] = d * static_cast<float>(1 + 2 * nibble);
    }
  }
};

// 8 * grid + 1, or - 1 where `minus` is 1. Without a branch: signs are as good as random.
static inline uint64_t iq1_codes(uint32_t place, uint32_t minus) {
  return add_to_bytes(kt::kIq1Grid.words[place], 0x0101010101010101 | (0 - static_cast<uint64_t>(minus)));
}

// | d | 32 places | 8 x (4 x 3 top bits of places, 3 bits of scale, sign of the eighth) |
struct IQ1_S {
  static constexpr const char* kName = "IQ1_S";
  static constexpr int kId = 19, kColumns = 256, kBytes = 50, kGroup = 32;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float*) {
    const float d = half_at(block);
    for (int g = 0; g < 8; ++g) {
      const uint8_t* places = block + 2 + 4 * g;
      const uint32_t word = word_at<uint16_t>(block + 34 + 2 * g);
      for (int i = 0; i < 4; ++i) {
        put(codes + 32 * g + 8 * i, iq1_codes(places[i] | (word >> (3 * i) & 7) << 8, word >> 15));
      }
      scale[g] = d * static_cast<float>(2 * (word >> 12 & 7) + 1) * 0.125f;
    }
  }
};

// | 32 places | 32 x (3 top bits of the place, sign of the eighth) | 4 x (4 x 3 bits of scale, 4 bits of d) |
struct IQ1_M {
  static constexpr const char* kName = "IQ1_M";
  static constexpr int kId = 29, kColumns = 256, kBytes = 56, kGroup = 16;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float*) {
    uint16_t words[4];
    memcpy(words, block + 48, 8);
    const float d = half(
        static_cast<uint16_t>(words[0] >> 12 | (words[1] >> 12) << 4 | (words[2] >> 12) << 8 | (words[3] & 0xF000)));
    for (int i = 0; i < 32; i += 2) {
      const uint32_t high = block[32 + i / 2];
      put(codes + 8 * i, iq1_codes(block[i] | (high & 7) << 8, high >> 3 & 1));
      put(codes + 8 * i + 8, iq1_codes(block[i + 1] | (high & 0x70) << 4, high >> 7));
    }
    for (int g = 0; g < 16; ++g) {
      scale[g] = d * static_cast<float>(2 * (words[g / 4] >> (g % 4 * 3) & 7) + 1) * 0.125f;
    }
  }
};
