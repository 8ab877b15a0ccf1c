// Blocks of 256 columns whose codes are places in a grid of 8 or 4 columns. Included by block_types-inl.h.
//
// IQ2, IQ3: the grid has magnitudes, above 0, and signs stand apart. IQ1: a number is (grid + 1/8) or (grid - 1/8),
// here 8 * grid + 1 or - 1 with an eighth of the scale.

// Sixteen magnitudes with the signs of the masks, 0xFF for minus.
static inline void put_signed(int8_t* codes, Words2 magnitudes, Words2 masks) {
  put<Bytes16>(codes, ((Bytes16)magnitudes ^ (Bytes16)masks) - (Bytes16)masks);
}

// Nibbles as sixteen scales d * (1/2 + nibble) / 4 of 16 columns: IQ2_XS, IQ2_S.
static inline void nibble_scales(float d, const uint8_t* bytes, float* scale) {
  for (int g = 0; g < 16; ++g) {
    const int nibble = bytes[g / 2] >> (g % 2 * 4) & 15;
    scale[g] = d * (0.5f + static_cast<float>(nibble)) * 0.25f;
  }
}

// Masks of two times 7 bits of signs.
static inline Words2 even_signs(uint32_t bits) {
  return Words2{kt::kEvenSignMasks.words[bits & 127], kt::kEvenSignMasks.words[bits >> 7 & 127]};
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
      for (int i = 0; i < 4; i += 2) {
        put_signed(codes + 32 * g + 8 * i,
                   Words2{kt::kIq2XxsGrid.words[places[i]], kt::kIq2XxsGrid.words[places[i + 1]]},
                   even_signs(word >> (7 * i)));
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
    for (int i = 0; i < 32; i += 2) {
      const uint32_t a = word_at<uint16_t>(block + 2 + 2 * i);
      const uint32_t b = word_at<uint16_t>(block + 4 + 2 * i);
      put_signed(codes + 8 * i, Words2{kt::kIq2XsGrid.words[a & 511], kt::kIq2XsGrid.words[b & 511]},
                 Words2{kt::kEvenSignMasks.words[a >> 9], kt::kEvenSignMasks.words[b >> 9]});
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
      for (int i = 0; i < 4; i += 2) {
        put_signed(codes + 32 * g + 8 * i,
                   Words2{kt::kIq2SGrid.words[places[i] | (top >> (2 * i) & 0x300)],
                          kt::kIq2SGrid.words[places[i + 1] | (top >> (2 * i + 2) & 0x300)]},
                   Words2{kt::kSignMasks.words[signs[i]], kt::kSignMasks.words[signs[i + 1]]});
      }
    }
    nibble_scales(half_at(block), block + 74, scale);
  }
};

using Words4 = uint32_t __attribute__((vector_size(16)));

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
      const auto& grid = kt::kIq3XxsGrid.words;
      for (int i = 0; i < 4; i += 2, places += 4) {
        const Words4 four = {grid[places[0]], grid[places[1]], grid[places[2]], grid[places[3]]};
        put_signed(codes + 32 * g + 8 * i, (Words2)four, even_signs(word >> (7 * i)));
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
      const auto entry = [&](int i) { return kt::kIq3SGrid.words[places[i] | (high >> i & 256)]; };
      for (int i = 0; i < 4; i += 2) {
        const Words4 four = {entry(2 * i), entry(2 * i + 1), entry(2 * i + 2), entry(2 * i + 3)};
        put_signed(codes + 32 * g + 8 * i, (Words2)four,
                   Words2{kt::kSignMasks.words[signs[4 * g + i]], kt::kSignMasks.words[signs[4 * g + i + 1]]});
      }
      const int nibble = block[106 + g / 2] >> (g % 2 * 4) & 15;
      scale[g] = d * static_cast<float>(1 + 2 * nibble);
    }
  }
};

// Two entries of 8 * grid, plus 1, or minus 1 where bits 0 and 1 of `minus` are set. Without a branch: signs are as
// good as random.
static inline void put_iq1(int8_t* codes, uint32_t first, uint32_t second, uint32_t minus) {
  constexpr uint64_t kOne = 0x0101010101010101;
  static constexpr uint64_t kAdded[4][2] = {
      {kOne, kOne}, {~uint64_t{0}, kOne}, {kOne, ~uint64_t{0}}, {~uint64_t{0}, ~uint64_t{0}}};
  const Words2 grid = {kt::kIq1Grid.words[first], kt::kIq1Grid.words[second]};
  put<Bytes16>(codes, (Bytes16)grid + word_at<Bytes16>(reinterpret_cast<const uint8_t*>(kAdded[minus])));
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
      const auto place = [&](int i) { return places[i] | (word >> (3 * i) & 7) << 8; };
      for (int i = 0; i < 4; i += 2) put_iq1(codes + 32 * g + 8 * i, place(i), place(i + 1), (word >> 15) * 3);
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
      put_iq1(codes + 8 * i, block[i] | (high & 7) << 8, block[i + 1] | (high & 0x70) << 4,
              (high >> 3 & 1) | (high >> 6 & 2));
    }
    for (int g = 0; g < 16; ++g) {
      scale[g] = d * static_cast<float>(2 * (words[g / 4] >> (g % 4 * 3) & 7) + 1) * 0.125f;
    }
  }
};
