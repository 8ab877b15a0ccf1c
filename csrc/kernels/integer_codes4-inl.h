// 4-bit codes for int8 activations: weights are bytes, four columns of a row in each 32-bit lane. Included before
// gemm-inl.h, with `Ops` defined (see planes-inl.h for the contract). Tables::offset is what stored bytes have too much
// in every product with an activation: Ops::open() takes it back.
//
// A word's low nibbles are columns 0 4 1 5, its high nibbles 2 6 3 7, and the rows stand in that order.

struct IntegerCodes4 : OnePlane<8, 128> {
  static constexpr bool kScaled = true;
  using ScaleTypes = ScaleList<F32Scales, Bf16Scales, F16Scales, E8m0Scales, E4m3Scales, F16MinScales, SuperMinScales>;
  static constexpr int kDots = 2, kOutputs = 1;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = kt::prepare_nibble_order;
  struct Tables {
    Ops::Bytes integers;
    explicit Tables(const kt::PanelLayout& layout) : integers(Ops::byte_table(layout.integers)) {}
  };
  using Decoded = Ops::Bytes;
  static inline __attribute__((always_inline)) void decode(const Tables& t, Cursor chunk, int slice,
                                                           Decoded (&out)[2][1]) {
    const Ops::Bytes words = Ops::load_bytes(chunk + slice * kSliceBytes);
    out[0][0] = Ops::look_up(t.integers, Ops::low_nibbles(words));
    out[1][0] = Ops::look_up(t.integers, Ops::high_nibbles(words));
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(const Decoded& bytes) {
    return Ops::unsigned_weights(bytes);
  }
};
