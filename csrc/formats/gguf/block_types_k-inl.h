// Blocks of 256 columns with scales of scales ("K-quants"), and IQ4_XS. Included by block_types-inl.h.

// 12 bytes: eight scales and eight minimums of 6 bits. The first four of each are the low bits of bytes 0..3 and 4..7,
// whose top bits are those of the last four; bytes 8..11 have the low nibbles of these.
static inline void six_bit_scales(const uint8_t* bytes, kt::BlockScales& s) {
  const uint32_t a = word_at<uint32_t>(bytes);
  const uint32_t b = word_at<uint32_t>(bytes + 4);
  const uint32_t c = word_at<uint32_t>(bytes + 8);
  const uint32_t sc[2] = {a & 0x3F3F3F3F, (c & 0x0F0F0F0F) | (a >> 2 & 0x30303030)};
  const uint32_t m[2] = {b & 0x3F3F3F3F, (c >> 4 & 0x0F0F0F0F) | (b >> 2 & 0x30303030)};
  memcpy(s.sc, sc, 8);
  memcpy(s.m, m, 8);
}

// Byte j holds columns 32 s + j, two bits each from the lowest on; less `less`.
static inline void two_bits(const uint8_t* from, void* codes, uint8_t less) {
  const Bytes32 bytes = word_at<Bytes32>(from);
  for (int s = 0; s < 4; ++s) put<Bytes32>(static_cast<uint8_t*>(codes) + 32 * s, (bytes >> (2 * s) & 3) - less);
}

// | 16 x (scale, minimum as nibbles) | 2 x 32 bytes of two bits, of 128 columns each | d | dmin |  q * d * sc - dmin *
// m
struct Q2_K : RepackedType<Q2_K> {
  static constexpr const char* kName = "Q2_K";
  static constexpr int kId = 10, kColumns = 256, kBytes = 84, kGroup = 16, kOffset = 0;
  static constexpr bool kLow = true;
  template <uint8_t kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    for (int h = 0; h < 2; ++h) two_bits(block + 16 + 32 * h, codes + 128 * h, 0);
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) {
    s.d = word_at<uint16_t>(block + 80);
    s.dmin = word_at<uint16_t>(block + 82);
    for (int g = 0; g < 16; ++g) {
      s.sc[g] = static_cast<int8_t>(block[g] & 15);
      s.m[g] = block[g] >> 4;
    }
  }
};

// | 32 bytes of third bits | 64 bytes as in Q2_K | 12 bytes of scales | d |  (q - 4) * d * sc
// Bit 4 h + s of byte j belongs to column 128 h + 32 s + j. Sixteen scales of 6 bits less 32: bytes 0..7 hold the low
// nibbles of scales 0..7 and 8..15, bytes 8..11 the top bits of scales 0..3, 4..7, 8..11 and 12..15.
struct Q3_K : RepackedType<Q3_K> {
  static constexpr const char* kName = "Q3_K";
  static constexpr int kId = 11, kColumns = 256, kBytes = 110, kGroup = 16, kOffset = 4;
  static constexpr bool kLow = false;
  template <uint8_t kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    const Bytes32 high = word_at<Bytes32>(block);
    for (int h = 0; h < 2; ++h) {
      const Bytes32 low = word_at<Bytes32>(block + 32 + 32 * h);
      for (int s = 0; s < 4; ++s, codes += 32) {
        put<Bytes32>(codes, (low >> (2 * s) & 3) + (high >> (4 * h + s) & 1) * 4 - kLess);
      }
    }
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) {
    s.d = word_at<uint16_t>(block + 108);
    s.dmin = 0;
    memset(s.m, 0, sizeof(s.m));
    const uint8_t* low = block + 96;
    const uint8_t* high = block + 104;
    for (int g = 0; g < 16; ++g) {
      const int nibble = low[g % 8] >> (g / 8 * 4) & 15;
      s.sc[g] = static_cast<int8_t>((nibble | (high[g % 4] >> (g / 4 * 2) & 3) << 4) - 32);
    }
  }
};

// | d | dmin | 12 bytes of scales | 128 bytes of nibbles |  q * d * sc - dmin * m
// Byte 32 i + j holds columns 64 i + j and 64 i + 32 + j.
struct Q4_K : RepackedType<Q4_K> {
  static constexpr const char* kName = "Q4_K";
  static constexpr int kId = 12, kColumns = 256, kBytes = 144, kGroup = 32, kOffset = 0;
  static constexpr bool kLow = true;
  template <uint8_t kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    for (int i = 0; i < 4; ++i) nibbles<Bytes32>(block + 16 + 32 * i, codes + 64 * i);
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) {
    s.d = word_at<uint16_t>(block);
    s.dmin = word_at<uint16_t>(block + 2);
    six_bit_scales(block + 4, s);
  }
};

// | d | dmin | 12 bytes of scales | 32 bytes of fifth bits | 128 bytes of nibbles |  q * d * sc - dmin * m
// Nibbles as in Q4_K; bits 2 i and 2 i + 1 of byte j belong to columns 64 i + j and 64 i + 32 + j.
struct Q5_K : RepackedType<Q5_K> {
  static constexpr const char* kName = "Q5_K";
  static constexpr int kId = 13, kColumns = 256, kBytes = 176, kGroup = 32, kOffset = 0;
  static constexpr bool kLow = true;
  template <uint8_t kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    const Bytes32 high = word_at<Bytes32>(block + 16);
    for (int i = 0; i < 4; ++i, codes += 64) {
      const Bytes32 low = word_at<Bytes32>(block + 48 + 32 * i);
      put<Bytes32>(codes, (low & 15) | (high >> (2 * i) & 1) << 4);
      put<Bytes32>(codes + 32, low >> 4 | (high >> (2 * i + 1) & 1) << 4);
    }
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) { Q4_K::scales(block, s); }
};

// | 128 bytes of nibbles | 64 bytes of top bits | 16 int8 scales | d |  (q - 32) * d * sc
// Of half h, byte 64 h + 32 i + j of the nibbles holds columns 32 i + j and 64 + 32 i + j, and byte 32 h + j of the top
// bits columns 32 s + j, two bits each.
struct Q6_K : RepackedType<Q6_K> {
  static constexpr const char* kName = "Q6_K";
  static constexpr int kId = 14, kColumns = 256, kBytes = 210, kGroup = 16, kOffset = 32;
  static constexpr bool kLow = false;
  template <uint8_t kLess>
  static inline void unpack(const uint8_t* block, uint8_t* codes) {
    for (int h = 0; h < 2; ++h) {
      const Bytes32 high = word_at<Bytes32>(block + 128 + 32 * h);
      for (int s = 0; s < 4; ++s, codes += 32) {
        const Bytes32 low = word_at<Bytes32>(block + 64 * h + s % 2 * 32);
        put<Bytes32>(codes, ((low >> (s / 2 * 4) & 15) | (high >> (2 * s) & 3) << 4) - kLess);
      }
    }
  }
  static inline void scales(const uint8_t* block, kt::BlockScales& s) {
    s.d = word_at<uint16_t>(block + 208);
    s.dmin = 0;
    memcpy(s.sc, block + 192, 16);
    memset(s.m, 0, sizeof(s.m));
  }
};

// | d | 8 x top bits of scales | 4 bytes of low nibbles of scales | 128 bytes of nibbles |  kTable[q] * d * (sc - 32)
struct IQ4_XS : Iq4Table {
  static constexpr const char* kName = "IQ4_XS";
  static constexpr int kId = 23, kColumns = 256, kBytes = 136, kGroup = 32, kOffset = 0;
  static constexpr bool kLow = false, kRepacked = true;
  static inline int scale_of(const uint8_t* block, int group) {
    const int low = block[4 + group / 2] >> (group % 2 * 4) & 15;
    return (low | (word_at<uint16_t>(block + 2) >> (2 * group) & 3) << 4) - 32;
  }
  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float*) {
    look_up_nibbles<256>(kTable, block + 8, codes);
    const float d = half_at(block);
    for (int g = 0; g < 8; ++g) scale[g] = d * static_cast<float>(scale_of(block, g));
  }
  static inline void parts(const uint8_t* block, kt::BlockParts& parts) {
    stored_nibbles<256>(block + 8, parts.codes);
    parts.d = word_at<uint16_t>(block);
    parts.dmin = 0;
    for (int g = 0; g < 8; ++g) parts.sc[g] = static_cast<int8_t>(scale_of(block, g));
    memset(parts.m, 0, sizeof(parts.m));
  }
};
