// How the codes of a panel become pairs of bf16, compiled with gemm-inl.h. A chunk holds all 32 rows of kChunkK
// columns; one vector of it, a slice, gives kPairs pairs of columns for kOutputs vectors of rows (PanelGemm::vec_of
// says which). Every decoded value is exact: e4m3 and the 4-bit tables fit bf16.
//
// Ops provides on vectors of bytes (`Bytes`; unpack and shuffle work within 16-byte lanes, as the instructions do):
//   load_bytes, table16(const uint8_t*), set_bytes, add_bytes, and_bits, xor_bits, shuffle_bytes(table, index),
//   high_nibbles, nibbles_up (<< 4 of bytes below 16), unpack_low, unpack_high

// bf16: a slice is what it decodes to.
struct CodesBf16 {
  static constexpr bool kScaled = false;
  static constexpr int kChunkK = 2, kChunkBytes = 128, kPairs = 1, kOutputs = 1;
  struct Tables {
    explicit Tables(const kt::PanelLayout&) {}
  };
  static inline __attribute__((always_inline)) void decode(const Tables&, const uint8_t* slice,
                                                           Ops::Pairs (&out)[1][1]) {
    out[0][0] = Ops::load_pairs(slice);
  }
};

// float8_e4m3fn: s eeee mmm, bias 7; no infinities; s 1111 111 is NaN; e = 0 is m * 2^-9.
//
// As bf16 (bias 127) a normal number has the exponent e + 120: high byte s | (60 + (e >> 1)), low byte
// (e & 1) << 7 | m << 4 = low nibble << 4. The high byte is a table look-up by the high nibble. Codes whose high nibble
// is s000 include the subnormals: there a second look-up, by the low nibble, gives what to flip. Its index is
// low nibble + select[high nibble]; the sum has bit 7 set, which makes the look-up give zero, except
//   select = 0 for s000: the index is the low nibble;
//   select = 0xF1 for s111: only low nibble 15, the NaN, wraps around to index 0, whose flip of 0x3C (made for the
//   code zero) turns its high byte 0x43 into 0x7F: a bf16 NaN.
struct CodesE4m3 {
  static constexpr bool kScaled = true;
  static constexpr int kChunkK = 2, kChunkBytes = 64, kPairs = 1, kOutputs = 2;
  struct Tables {
    Ops::Bytes high, select, flip_high, flip_low;
    explicit Tables(const kt::PanelLayout&) {
      alignas(16) static constexpr uint8_t kHigh[16] = {60,  61,  62,  63,  64,  65,  66,  67,
                                                        188, 189, 190, 191, 192, 193, 194, 195};
      alignas(16) static constexpr uint8_t kSelect[16] = {0, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0xF1,
                                                          0, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0xF1};
      // m * 2^-9 in bf16: 0, 3B00, 3B80, 3BC0, 3C00, 3C20, 3C40, 3C60; the rule for normals would give 3C00 | m << 4.
      alignas(16) static constexpr uint8_t kFlipHigh[16] = {0x3C, 0x07, 0x07, 0x07};
      alignas(16) static constexpr uint8_t kFlipLow[16] = {0x00, 0x10, 0xA0, 0xF0, 0x40, 0x70, 0x20, 0x10};
      high = Ops::table16(kHigh);
      select = Ops::table16(kSelect);
      flip_high = Ops::table16(kFlipHigh);
      flip_low = Ops::table16(kFlipLow);
    }
  };
  static inline __attribute__((always_inline)) void decode(const Tables& t, const uint8_t* slice,
                                                           Ops::Pairs (&out)[1][2]) {
    const Ops::Bytes codes = Ops::load_bytes(slice);
    const Ops::Bytes low_nibble = Ops::and_bits(codes, Ops::set_bytes(15));
    const Ops::Bytes high_nibble = Ops::high_nibbles(codes);
    const Ops::Bytes index = Ops::add_bytes(low_nibble, Ops::shuffle_bytes(t.select, high_nibble));
    const Ops::Bytes high =
        Ops::xor_bits(Ops::shuffle_bytes(t.high, high_nibble), Ops::shuffle_bytes(t.flip_high, index));
    const Ops::Bytes low = Ops::xor_bits(Ops::nibbles_up(low_nibble), Ops::shuffle_bytes(t.flip_low, index));
    out[0][0] = Ops::unpack_low(low, high);
    out[0][1] = Ops::unpack_high(low, high);
  }
};

// 4-bit codes, any table of 16 bf16 values: low nibbles hold the first pair of columns, high nibbles the second.
struct Codes4 {
  static constexpr bool kScaled = true;
  static constexpr int kChunkK = 4, kChunkBytes = 64, kPairs = 2, kOutputs = 2;
  struct Tables {
    Ops::Bytes low, high;
    explicit Tables(const kt::PanelLayout& layout)
        : low(Ops::table16(layout.table_low)), high(Ops::table16(layout.table_high)) {}
  };
  static inline __attribute__((always_inline)) void decode(const Tables& t, const uint8_t* slice,
                                                           Ops::Pairs (&out)[2][2]) {
    const Ops::Bytes codes = Ops::load_bytes(slice);
    const Ops::Bytes nibbles[2] = {Ops::and_bits(codes, Ops::set_bytes(15)), Ops::high_nibbles(codes)};
    for (int q = 0; q < 2; ++q) {
      const Ops::Bytes low = Ops::shuffle_bytes(t.low, nibbles[q]);
      const Ops::Bytes high = Ops::shuffle_bytes(t.high, nibbles[q]);
      out[q][0] = Ops::unpack_low(low, high);
      out[q][1] = Ops::unpack_high(low, high);
    }
  }
};
