// Codes whose decode is the same text on every instruction set (planes-inl.h has the contract; the e4m3-inl.h files
// hold others, integer_codes*-inl.h those for int8 activations). Included before gemm-inl.h, with `Ops` defined.

// bf16: a slice is a vector of pairs.
struct CodesBf16 : OnePlane<2, 128> {
  static constexpr bool kScaled = false;
  using ScaleTypes = ScaleList<NoScales>;
  static constexpr float kSumFactor = 1;
  static constexpr int kDots = 1, kOutputs = 1;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = nullptr;
  struct Tables {
    explicit Tables(const kt::PanelLayout&) {}
  };
  using Decoded = Ops::Pairs;
  static inline __attribute__((always_inline)) void decode(const Tables&, Cursor chunk, int slice,
                                                           Decoded (&out)[1][1]) {
    out[0][0] = Ops::load_pairs(chunk + slice * kSliceBytes);
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(Decoded pairs) { return Ops::widen(pairs); }
};

// 4-bit codes, any table of 16 bf16 values.
struct Codes4 : OnePlane<8, 128> {
  static constexpr bool kScaled = true;
  using ScaleTypes = ScaleList<F32Scales, Bf16Scales, F16Scales, E8m0Scales, E4m3Scales>;
  static constexpr float kSumFactor = 1;
  static constexpr int kDots = 4, kOutputs = 1;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = nullptr;
  struct Tables {
    Ops::NibbleTable values;
    explicit Tables(const kt::PanelLayout& layout) : values(Ops::nibble_table(layout.table)) {}
  };
  using Decoded = Ops::Pairs;
  static inline __attribute__((always_inline)) void decode(const Tables& t, Cursor chunk, int slice,
                                                           Decoded (&out)[4][1]) {
    Ops::Pairs pairs[4];
    Ops::look_up_nibbles(t.values, Ops::load_pairs(chunk + slice * kSliceBytes), pairs);
    for (int q = 0; q < 4; ++q) out[q][0] = pairs[q];
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(Decoded pairs) { return Ops::widen(pairs); }
};

// Signed bytes: a slice is a vector of four columns each, which becomes two pairs.
struct Codes8 : OnePlane<4, 128> {
  static constexpr bool kScaled = true;
  using ScaleTypes = ScaleList<F32Scales>;
  static constexpr float kSumFactor = 1;
  static constexpr int kDots = 2, kOutputs = 1;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = nullptr;
  struct Tables {
    explicit Tables(const kt::PanelLayout&) {}
  };
  using Decoded = Ops::Weights;
  static inline __attribute__((always_inline)) void decode(const Tables&, Cursor chunk, int slice,
                                                           Decoded (&out)[2][1]) {
    const Ops::Pairs codes = Ops::load_pairs(chunk + slice * kSliceBytes);
    out[0][0] = Ops::template from_int8<0>(codes);
    out[1][0] = Ops::template from_int8<2>(codes);
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(const Decoded& w) { return w; }
};
