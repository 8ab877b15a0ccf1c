// How the codes of a panel become weights that Ops can multiply: formats whose decode is the same text on every
// instruction set (the e4m3-inl.h files hold others, integer_codes-inl.h those for int8 activations). Included before
// gemm-inl.h, with `Ops` defined.
//
// Decoding comes in two steps, so that few registers wait: decode() for a whole slice, weights() for one result of it.
//
// A chunk holds all 32 rows of kChunkK columns. Codes know where chunks stand: a Cursor points at one, at() finds it,
// next() is the one behind, shifted() the same in another panel, prefetch() asks for its lines. One vector of a chunk,
// a slice, gives kDots x kDotK columns (ascending) for kOutputs vectors of rows: output j of slice s is vector
// s * kOutputs + j of the panel. Every decoded value is exact, or exact but for the factor 1 / kSumFactor.

// The chunks of a panel one behind the other.
template <int kColumns, int kBytes>
struct OnePlane {
  static constexpr int kChunkK = kColumns, kChunkBytes = kBytes;
  static constexpr int kSliceBytes = 4 * Ops::kLanes;  // one vector of codes
  static constexpr int kSlices = kChunkBytes / kSliceBytes;
  using Cursor = const uint8_t*;
  static inline __attribute__((always_inline)) Cursor at(const kt::PanelLayout&, const uint8_t* panel, int k) {
    return panel + static_cast<size_t>(k) * kBytes / kColumns;
  }
  static inline __attribute__((always_inline)) Cursor next(Cursor chunk) { return chunk + kBytes; }
  static inline __attribute__((always_inline)) Cursor shifted(Cursor chunk, size_t bytes) { return chunk + bytes; }
  static inline __attribute__((always_inline)) void prefetch(Cursor chunk) {
    for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(chunk + line, 0, 3);
  }
};

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
