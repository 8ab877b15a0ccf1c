// 2-bit codes for int8 activations: weights are bytes, four columns of a row in each 32-bit lane (formats/codes/code2.h
// has the picture). Included before gemm-inl.h, with `Ops` defined (see planes-inl.h for the contract). Tables::offset
// is what stored bytes have too much in every product with an activation: Ops::open() takes it back.
//
// The rows stand in the order of the columns.

struct IntegerCodes2 : Composite<16, 1> {
  static constexpr bool kScaled = true;
  using ScaleTypes = ScaleList<SuperMin4Scales>;
  static constexpr int kDots = 4, kOutputs = 1;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = kt::prepare_column_order;
  struct Tables {
    explicit Tables(const kt::PanelLayout&) {}
  };
  using Decoded = Ops::Bytes;

  static inline __attribute__((always_inline)) void decode(const Tables&, Cursor chunk, int slice,
                                                           Decoded (&out)[4][1]) {
    constexpr int kTwo = 0x03;
    const Ops::Bytes words = word(chunk, 0, slice);
    out[0][0] = Ops::template bits<kTwo>(words);
    out[1][0] = Ops::template bits<kTwo>(Ops::template shifted<2>(words));
    out[2][0] = Ops::template bits<kTwo>(Ops::template shifted<4>(words));
    out[3][0] = Ops::template bits<kTwo>(Ops::template shifted<6>(words));
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(const Decoded& bytes) {
    return Ops::unsigned_weights(bytes);
  }
};
