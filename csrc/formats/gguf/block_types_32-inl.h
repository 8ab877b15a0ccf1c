// Blocks of 32 columns (NVFP4: 64). Included by block_types-inl.h.
//
// Nibbles: byte i of a group of n columns holds column i (low) and column n/2 + i (high).

// | d | 16 bytes of nibbles |  (q - 8) * d
struct Q4_0 : RepackedType<Q4_0> {
  static constexpr const char* kName = "Q4_0";
  static constexpr int kId = 2, kColumns = 32, kBytes = 18, kGroup = 32, kOffset = 8;
  static constexpr bool kLow = false;
  template <uint8_t kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    nibbles<Bytes16, kLess>(block + 2, codes);
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) { s = {word_at<uint16_t>(block), 0, {1}, {}}; }
};

// | d | m | 16 bytes of nibbles |  q * d + m
struct Q4_1 : RepackedType<Q4_1> {
  static constexpr const char* kName = "Q4_1";
  static constexpr int kId = 3, kColumns = 32, kBytes = 20, kGroup = 32, kOffset = 0;
  static constexpr bool kLow = true;
  template <uint8_t kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    nibbles<Bytes16, kLess>(block + 4, codes);
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) {
    s = {word_at<uint16_t>(block), word_at<uint16_t>(block + 2), {1}, {}};
  }
};

// Nibbles and, in 32 bits, the fifth bit of each column.
template <uint8_t kLess>
static inline void five_bits(const uint8_t* high, const uint8_t* low, uint8_t* codes) {
  const auto& masks = kt::kSignMasks.words;
  const Words2 first = {masks[high[0]], masks[high[1]]};
  const Words2 second = {masks[high[2]], masks[high[3]]};
  const Bytes16 bytes = word_at<Bytes16>(low);
  put<Bytes16>(codes, ((bytes & 15) | ((Bytes16)first & 16)) - kLess);
  put<Bytes16>(codes + 16, (bytes >> 4 | ((Bytes16)second & 16)) - kLess);
}

// | d | 4 bytes of fifth bits | 16 bytes of nibbles |  (q - 16) * d
struct Q5_0 : RepackedType<Q5_0> {
  static constexpr const char* kName = "Q5_0";
  static constexpr int kId = 6, kColumns = 32, kBytes = 22, kGroup = 32, kOffset = 16;
  static constexpr bool kLow = false;
  template <uint8_t kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    five_bits<kLess>(block + 2, block + 6, codes);
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) { s = {word_at<uint16_t>(block), 0, {1}, {}}; }
};

// | d | m | 4 bytes of fifth bits | 16 bytes of nibbles |  q * d + m
struct Q5_1 : RepackedType<Q5_1> {
  static constexpr const char* kName = "Q5_1";
  static constexpr int kId = 7, kColumns = 32, kBytes = 24, kGroup = 32, kOffset = 0;
  static constexpr bool kLow = true;
  template <uint8_t kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    five_bits<kLess>(block + 4, block + 8, codes);
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) {
    s = {word_at<uint16_t>(block), word_at<uint16_t>(block + 2), {1}, {}};
  }
};

// | d | 32 int8 |
struct Q8_0 : RepackedType<Q8_0> {
  static constexpr const char* kName = "Q8_0";
  static constexpr int kId = 8, kColumns = 32, kBytes = 34, kGroup = 32, kOffset = 0;
  static constexpr bool kLow = false;
  template <uint8_t kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    memcpy(codes, block + 2, 32);
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) { s = {word_at<uint16_t>(block), 0, {1}, {}}; }
};

// Nibbles of runs of 32 columns, and what they look up in a table.
template <int kColumns>
static inline void stored_nibbles(const uint8_t* from, uint8_t* codes) {
  for (int i = 0; i < kColumns; i += 32) nibbles<Bytes16>(from + i / 2, codes + i);
}
template <int kColumns>
static inline void look_up_nibbles(const int8_t (&table)[16], const uint8_t* from, int8_t* codes) {
  for (int i = 0; i < kColumns; i += 32) {
    const Bytes16 bytes = word_at<Bytes16>(from + i / 2);
    put(codes + i, look_up(table, bytes & 15));
    put(codes + i + 16, look_up(table, bytes >> 4));
  }
}

struct Iq4Table {
  static constexpr int8_t kTable[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
};

// | d | 16 bytes of nibbles |  kTable[q] * d
struct IQ4_NL : Iq4Table {
  static constexpr const char* kName = "IQ4_NL";
  static constexpr int kId = 20, kColumns = 32, kBytes = 18, kGroup = 32, kOffset = 0;
  static constexpr bool kLow = false, kRepacked = true;
  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float*) {
    look_up_nibbles<32>(kTable, block + 2, codes);
    scale[0] = half_at(block);
  }
  static inline void parts(const uint8_t* block, kt::BlockParts& parts) {
    stored_nibbles<32>(block + 2, parts.codes);
    static_cast<kt::BlockScales&>(parts) = {word_at<uint16_t>(block), 0, {1}, {}};
  }
};

// Twice E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, without a negative zero.
struct E2m1Table {
  static constexpr int8_t kTable[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
};

// | exponent e | 16 bytes of nibbles |  kTable[q] * 2^(e - 128)
struct MXFP4 : E2m1Table {
  static constexpr const char* kName = "MXFP4";
  static constexpr int kId = 39, kColumns = 32, kBytes = 17, kGroup = 32, kOffset = 0;
  static constexpr bool kLow = false, kRepacked = true;
  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float*) {
    look_up_nibbles<32>(kTable, block + 1, codes);
    const uint32_t e = block[0];
    scale[0] = float_of(e < 2 ? 0x00200000u << e : (e - 1) << 23);  // e < 2: subnormal
  }
  static inline void parts(const uint8_t* block, kt::BlockParts& parts) {
    stored_nibbles<32>(block + 1, parts.codes);
    static_cast<kt::BlockScales&>(parts) = {block[0], 0, {1}, {}};
  }
};

// | 4 scales | 32 bytes of nibbles, 8 for each scale |  kTable[q] * scale / 2
// A scale is an e4m3 whose sign does not count (bias 7); 0x7F, which is NaN elsewhere, is 0.
struct NVFP4 : E2m1Table {
  static constexpr const char* kName = "NVFP4";
  static constexpr int kId = 40, kColumns = 64, kBytes = 36, kGroup = 16;
  static constexpr bool kLow = false, kRepacked = false;
  // As IEEE half, whose exponent has one bit more, e4m3 reads 2^-8 of its value.
  static inline float half_of_e4m3(uint32_t bits) {
    const float value = half(static_cast<uint16_t>((bits & 0x7F) << 7)) * 128;
    return bits == 0x7F ? 0 : value;
  }
  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float*) {
    for (int i = 0; i < 64; i += 32) {
      const Bytes16 bytes = word_at<Bytes16>(block + 4 + i / 2);
      const Words2 low = (Words2)look_up(kTable, bytes & 15);
      const Words2 high = (Words2)look_up(kTable, bytes >> 4);
      put(codes + i, Words2{low[0], high[0]});
      put(codes + i + 16, Words2{low[1], high[1]});
    }
    for (int g = 0; g < 4; ++g) scale[g] = half_of_e4m3(block[g]);
  }
};
