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

static inline void put8(int8_t* codes, uint64_t bytes) { memcpy(codes, &bytes, 8); }

// Nibbles as sixteen scales d * (1/2 + nibble) / 4 of 16 columns: IQ2_XS, IQ2_S.
static inline void nibble_scales(float d, const uint8_t* bytes, float (&scale)[16], float (&low)[16]) {
  for (int g = 0; g < 16; ++g) {
    const int nibble = bytes[g / 2] >> (g % 2 * 4) & 15;
    scale[g] = d * (0.5f + static_cast<float>(nibble)) * 0.25f;
    low[g] = 0;
  }
}

// | d | 8 x (4 places, 4 x 7 bits of signs, 4 bits of scale) |
struct IQ2_XXS {
  static constexpr const char* kName = "IQ2_XXS";
  static constexpr int kId = 16, kColumns = 256, kBytes = 66, kGroup = 32;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, kt::BlockValues<256, 8>& values) {
    const float d = half_at(block);
    for (int g = 0; g < 8; ++g) {
      const uint8_t* places = block + 2 + 8 * g;
      const uint32_t word = word_at<uint32_t>(places + 4);
      for (int i = 0; i < 4; ++i) {
        const uint64_t mask = kt::kEvenSignMasks.words[word >> (7 * i) & 127];
        put8(values.codes + 32 * g + 8 * i, with_signs(kt::kIq2XxsGrid.words[places[i]], mask));
      }
      values.scale[g] = d * (0.5f + static_cast<float>(word >> 28)) * 0.25f;
      values.low[g] = 0;
    }
  }
};

// | d | 32 x (9 bits of place, 7 bits of signs) | 8 bytes of scales |
struct IQ2_XS {
  static constexpr const char* kName = "IQ2_XS";
  static constexpr int kId = 17, kColumns = 256, kBytes = 74, kGroup = 16;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, kt::BlockValues<256, 16>& values) {
    for (int i = 0; i < 32; ++i) {
      const uint32_t word = word_at<uint16_t>(block + 2 + 2 * i);
      put8(values.codes + 8 * i, with_signs(kt::kIq2XsGrid.words[word & 511], kt::kEvenSignMasks.words[word >> 9]));
    }
    nibble_scales(half_at(block), block + 66, values.scale, values.low);
  }
};

// | d | 32 places | 32 bytes of signs | 8 bytes of top bits of places | 8 bytes of scales |
struct IQ2_S {
  static constexpr const char* kName = "IQ2_S";
  static constexpr int kId = 22, kColumns = 256, kBytes = 82, kGroup = 16;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, kt::BlockValues<256, 16>& values) {
    const uint8_t* places = block + 2;
    const uint8_t* signs = block + 34;
    const uint8_t* high = block + 66;
    for (int i = 0; i < 32; ++i) {
      const int place = places[i] | (high[i / 4] >> (i % 4 * 2) & 3) << 8;
      put8(values.codes + 8 * i, with_signs(kt::kIq2SGrid.words[place], kt::kSignMasks.words[signs[i]]));
    }
    nibble_scales(half_at(block), block + 74, values.scale, values.low);
  }
};

// Two entries of four columns as eight.
static inline uint64_t joined(uint32_t first, uint32_t second) { return first | static_cast<uint64_t>(second) << 32; }

// | d | 64 places | 8 x (4 x 7 bits of signs, 4 bits of scale) |
struct IQ3_XXS {
  static constexpr const char* kName = "IQ3_XXS";
  static constexpr int kId = 18, kColumns = 256, kBytes = 98, kGroup = 32;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, kt::BlockValues<256, 8>& values) {
    const float d = half_at(block);
    const uint8_t* places = block + 2;
    for (int g = 0; g < 8; ++g) {
      const uint32_t word = word_at<uint32_t>(block + 66 + 4 * g);
      for (int i = 0; i < 4; ++i, places += 2) {
        const uint64_t grid = joined(kt::kIq3XxsGrid.words[places[0]], kt::kIq3XxsGrid.words[places[1]]);
        put8(values.codes + 32 * g + 8 * i, with_signs(grid, kt::kEvenSignMasks.words[word >> (7 * i) & 127]));
      }
      values.scale[g] = d * (0.5f + static_cast<float>(word >> 28)) * 0.5f;
      values.low[g] = 0;
    }
  }
};

// | d | 64 places | 8 bytes of top bits of places | 32 bytes of signs | 4 bytes of scales |
struct IQ3_S {
  static constexpr const char* kName = "IQ3_S";
  static constexpr int kId = 21, kColumns = 256, kBytes = 110, kGroup = 32;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, kt::BlockValues<256, 8>& values) {
    const float d = half_at(block);
    const uint8_t* signs = block + 74;
    for (int g = 0; g < 8; ++g) {
      const uint8_t* places = block + 2 + 8 * g;
      const uint32_t high = static_cast<uint32_t>(block[66 + g]) << 8;
      for (int i = 0; i < 4; ++i) {
        const uint64_t grid = joined(kt::kIq3SGrid.words[places[2 * i] | (high >> (2 * i) & 256)],
                                     kt::kIq3SGrid.words[places[2 * i + 1] | (high >> (2 * i + 1) & 256)]);
        put8(values.codes + 32 * g + 8 * i, with_signs(grid, kt::kSignMasks.words[signs[4 * g + i]]));
      }
      const int nibble = block[106 + g / 2] >> (g % 2 * 4) & 15;
      values.scale[g] = d * static_cast<float>(1 + 2 * nibble);
      values.low[g] = 0;
    }
  }
};

// 8 * grid + 1, or - 1 where the bit `minus` is set.
static inline uint64_t iq1_codes(int place, bool minus) {
  return add_to_bytes(kt::kIq1Grid.words[place], minus ? 0xFFFFFFFFFFFFFFFF : 0x0101010101010101);
}

// | d | 32 places | 8 x (4 x 3 top bits of places, 3 bits of scale, sign of the eighth) |
struct IQ1_S {
  static constexpr const char* kName = "IQ1_S";
  static constexpr int kId = 19, kColumns = 256, kBytes = 50, kGroup = 32;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, kt::BlockValues<256, 8>& values) {
    const float d = half_at(block);
    for (int g = 0; g < 8; ++g) {
      const uint8_t* places = block + 2 + 4 * g;
      const uint32_t word = word_at<uint16_t>(block + 34 + 2 * g);
      for (int i = 0; i < 4; ++i) {
        const int place = static_cast<int>(places[i] | (word >> (3 * i) & 7) << 8);
        put8(values.codes + 32 * g + 8 * i, iq1_codes(place, (word & 0x8000) != 0));
      }
      values.scale[g] = d * static_cast<float>(2 * (word >> 12 & 7) + 1) * 0.125f;
      values.low[g] = 0;
    }
  }
};

// | 32 places | 32 x (3 top bits of the place, sign of the eighth) | 4 x (4 x 3 bits of scale, 4 bits of d) |
struct IQ1_M {
  static constexpr const char* kName = "IQ1_M";
  static constexpr int kId = 29, kColumns = 256, kBytes = 56, kGroup = 16;
  static constexpr bool kLow = false, kRepacked = false;
  static inline void read(const uint8_t* block, kt::BlockValues<256, 16>& values) {
    uint16_t words[4];
    memcpy(words, block + 48, 8);
    const float d = half(
        static_cast<uint16_t>(words[0] >> 12 | (words[1] >> 12) << 4 | (words[2] >> 12) << 8 | (words[3] & 0xF000)));
    for (int i = 0; i < 32; ++i) {
      const int nibble = block[32 + i / 2] >> (i % 2 * 4) & 15;
      put8(values.codes + 8 * i, iq1_codes(block[i] | (nibble & 7) << 8, nibble > 7));
    }
    for (int g = 0; g < 16; ++g) {
      values.scale[g] = d * static_cast<float>(2 * (words[g / 4] >> (g % 4 * 3) & 7) + 1) * 0.125f;
      values.low[g] = 0;
    }
  }
};
