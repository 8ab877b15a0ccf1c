// How the codes of a panel become weights that Ops can multiply: formats whose decode is the same text on every
// instruction set (the e4m3-inl.h files hold the others). Included before gemm-inl.h, with `Ops` defined.
//
// Decoding comes in two steps, so that few registers wait: decode() for a whole slice, weights() for one result of it.
//
// A chunk holds all 32 rows of kChunkK columns. One vector of it, a slice, gives kPairs pairs of columns (ascending)
// for kOutputs vectors of rows: output j of slice s is vector s * kOutputs + j of the panel. Every decoded value is
// exact, or exact but for the factor 1 / kSumFactor.

// bf16: a slice is a vector of pairs.
struct CodesBf16 {
  static constexpr bool kScaled = false;
  static constexpr float kSumFactor = 1;
  static constexpr int kChunkK = 2, kChunkBytes = 128, kPairs = 1, kOutputs = 1;
  struct Tables {
    explicit Tables(const kt::PanelLayout&) {}
  };
  using Decoded = Ops::Pairs;
  static inline __attribute__((always_inline)) void decode(const Tables&, const uint8_t* slice, Decoded (&out)[1][1]) {
    out[0][0] = Ops::load_pairs(slice);
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(Decoded pairs) { return Ops::widen(pairs); }
};

// 4-bit codes, any table of 16 bf16 values.
struct Codes4 {
  static constexpr bool kScaled = true;
  static constexpr float kSumFactor = 1;
  static constexpr int kChunkK = 8, kChunkBytes = 128, kPairs = 4, kOutputs = 1;
  struct Tables {
    Ops::NibbleTable values;
    explicit Tables(const kt::PanelLayout& layout) : values(Ops::nibble_table(layout.table)) {}
  };
  using Decoded = Ops::Pairs;
  static inline __attribute__((always_inline)) void decode(const Tables& t, const uint8_t* slice,
                                                           Decoded (&out)[4][1]) {
    Ops::Pairs pairs[4];
    Ops::look_up_nibbles(t.values, Ops::load_pairs(slice), pairs);
    for (int q = 0; q < 4; ++q) out[q][0] = pairs[q];
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(Decoded pairs) { return Ops::widen(pairs); }
};
