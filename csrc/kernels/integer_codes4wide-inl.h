// 4-bit codes whose integers need 8 bits, for int8 activations: weights are bytes, four columns of a row in each 32-bit
// lane. Included before gemm-inl.h, with `Ops` defined (see planes-inl.h for the contract). Tables::offset is what
// looked up bytes have too much in every product with an activation: Ops::open() takes it back.
//
// The panel is that of other 4-bit codes, the order of the rows too (integer_codes4-inl.h).

struct IntegerCodes4Wide : OnePlane<8, 128> {
  static constexpr bool kScaled = true;
  using ScaleTypes = ScaleList<F16Scales, SuperScales>;
  static constexpr int kDots = 2, kOutputs = 1;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = kt::prepare_nibble_order;
  struct Tables {
    Ops::Bytes integers;  // as weights
    explicit Tables(const kt::PanelLayout& layout) : integers(Ops::signed_weights(Ops::byte_table(layout.integers))) {}
  };
  using Decoded = Ops::Bytes;
  static inline __attribute__((always_inline)) void decode(const Tables& t, Cursor chunk, int slice,
                                                           Decoded (&out)[2][1]) {
    const Ops::Bytes words = Ops::load_bytes(chunk + slice * kSliceBytes);
    out[0][0] = Ops::look_up(t.integers, Ops::low_nibbles(words));
    out[1][0] = Ops::look_up(t.integers, Ops::high_nibbles(words));
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(const Decoded& bytes) { return bytes; }
};
