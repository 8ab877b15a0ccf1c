// Blocks of 32 columns (NVFP4: 64). Included by block_types-inl.h.
//
// Nibbles: byte i of a group of n columns holds column i (low) and column n/2 + i (high).

// | d | 16 bytes of nibbles |  (q - 8) * d
struct Q4_0 : RepackedType<Q4_0, 32, 32> {
  static constexpr const char* kName = "Q4_0";
  static constexpr int kId = 2, kColumns = 32, kBytes = 18, kGroup = 32, kOffset = 8;
  static constexpr bool kLow = false;
  template <int kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    nibbles<kLess, 16>(block + 2, codes);
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) { s = {word_at<uint16_t>(block), 0, {1}, {}}; }
};

// | d | m | 16 bytes of nibbles |  q * d + m
struct Q4_1 : RepackedType<Q4_1, 32, 32> {
  static constexpr const char* kName = "Q4_1";
  static constexpr int kId = 3, kColumns = 32, kBytes = 20, kGroup = 32, kOffset = 0;
  static constexpr bool kLow = true;
  template <int kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    nibbles<kLess, 16>(block + 4, codes);
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) {
    s = {word_at<uint16_t>(block), word_at<uint16_t>(block + 2), {1}, {}};
  }
};

// Nibbles and, in 32 bits, the fifth bit of each column.
template <int kLess>
static inline void five_bits(const uint8_t* high, const uint8_t* low, uint8_t* codes) {
  nibbles<0, 16>(low, codes);
  const uint32_t bits = word_at<uint32_t>(high);
  for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>((codes[i] | (bits >> i & 1) << 4) - kLess);
}

// | d | 4 bytes of fifth bits | 16 bytes of nibbles |  (q - 16) * d
struct Q5_0 : RepackedType<Q5_0, 32, 32> {
  static constexpr const char* kName = "Q5_0";
  static constexpr int kId = 6, kColumns = 32, kBytes = 22, kGroup = 32, kOffset = 16;
  static constexpr bool kLow = false;
  template <int kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    five_bits<kLess>(block + 2, block + 6, codes);
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) { s = {word_at<uint16_t>(block), 0, {1}, {}}; }
};

// | d | m | 4 bytes of fifth bits | 16 bytes of nibbles |  q * d + m
struct Q5_1 : RepackedType<Q5_1, 32, 32> {
  static constexpr const char* kName = "Q5_1";
  static constexpr int kId = 7, kColumns = 32, kBytes = 24, kGroup = 32, kOffset = 0;
  static constexpr bool kLow = true;
  template <int kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    five_bits<kLess>(block + 4, block + 8, codes);
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) {
    s = {word_at<uint16_t>(block), word_at<uint16_t>(block + 2), {1}, {}};
  }
};

// | d | 32 int8 |
struct Q8_0 : RepackedType<Q8_0, 32, 32> {
  static constexpr const char* kName = "Q8_0";
  static constexpr int kId = 8, kColumns = 32, kBytes = 34, kGroup = 32, kOffset = 0;
  static constexpr bool kLow = false;
  template <int kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    memcpy(codes, block + 2, 32);
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) { s = {word_at<uint16_t>(block), 0, {1}, {}}; }
};

// Nibbles that look up T::kTable, of kColumns columns in runs of T::kRun.
template <class T>
static inline void look_up_nibbles(const uint8_t* from, int8_t* codes) {
  for (int i = 0; i < T::kColumns; i += T::kRun) {
    uint8_t index[T::kRun];
    nibbles<0, T::kRun / 2>(from + i / 2, index);
    for (int j = 0; j < T::kRun; j += 16) look_up(T::kTable, index + j, codes + i + j);
  }
}
template <class T>
static inline void stored_nibbles(const uint8_t* from, uint8_t* codes) {
  for (int i = 0; i < T::kColumns; i += T::kRun) nibbles<0, T::kRun / 2>(from + i / 2, codes + i);
}

struct Iq4Table {
  static constexpr int8_t kTable[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
};

// | d | 16 bytes of nibbles |  kTable[q] * d
struct IQ4_NL : Iq4Table {
  static constexpr const char* kName = "IQ4_NL";
  static constexpr int kId = 20, kColumns = 32, kBytes = 18, kGroup = 32, kOffset = 0, kRun = 32;
  static constexpr bool kLow = false, kRepacked = true;
  static inline void read(const uint8_t* block, kt::BlockValues<32, 1>& values) {
    look_up_nibbles<IQ4_NL>(block + 2, values.codes);
    values.scale[0] = half_at(block);
    values.low[0] = 0;
  }
  static inline void parts(const uint8_t* block, kt::BlockParts& parts) {
    stored_nibbles<IQ4_NL>(block + 2, parts.codes);
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
  static constexpr int kId = 39, kColumns = 32, kBytes = 17, kGroup = 32, kOffset = 0, kRun = 32;
  static constexpr bool kLow = false, kRepacked = true;
  static inline void read(const uint8_t* block, kt::BlockValues<32, 1>& values) {
    look_up_nibbles<MXFP4>(block + 1, values.codes);
    const uint32_t e = block[0];
    values.scale[0] = float_of(e < 2 ? 0x00200000u << e : (e - 1) << 23);  // e < 2: subnormal
    values.low[0] = 0;
  }
  static inline void parts(const uint8_t* block, kt::BlockParts& parts) {
    stored_nibbles<MXFP4>(block + 1, parts.codes);
    static_cast<kt::BlockScales&>(parts) = {block[0], 0, {1}, {}};
  }
};

// | 4 scales | 32 bytes of nibbles, 8 for each scale |  kTable[q] * scale / 2
// A scale is an e4m3 whose sign does not count (bias 7); 0x7F, which is NaN elsewhere, is 0.
struct NVFP4 : E2m1Table {
  static constexpr const char* kName = "NVFP4";
  static constexpr int kId = 40, kColumns = 64, kBytes = 36, kGroup = 16, kRun = 16;
  static constexpr bool kLow = false, kRepacked = false;
  static inline float half_of_e4m3(uint32_t bits) {
    if (bits == 0x7F) return 0;
    const uint32_t exponent = bits >> 3 & 15;
    const uint32_t mantissa = bits & 7;
    if (exponent == 0) return static_cast<float>(mantissa) * 0x1p-10f;
    return float_of((exponent + (127 - 8)) << 23 | mantissa << 20);
  }
  static inline void read(const uint8_t* block, kt::BlockValues<64, 4>& values) {
    look_up_nibbles<NVFP4>(block + 4, values.codes);
    for (int g = 0; g < 4; ++g) {
      values.scale[g] = half_of_e4m3(block[g]);
      values.low[g] = 0;
    }
  }
};
