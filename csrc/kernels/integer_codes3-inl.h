// 3-bit codes for int8 activations: weights are bytes, four columns of a row in each 32-bit lane (formats/codes/code3.h
// has the picture). Included before gemm-inl.h, with `Ops` defined (see planes-inl.h for the contract). Tables::offset
// is what stored bytes have too much in every product with an activation: Ops::open() takes it back.
//
// The rows stand in the order of the columns. Scales are of 16 columns, half a chunk, so a chunk has two sums.

struct IntegerCodes3 : Composite<32, 3> {
  static constexpr bool kScaled = true;
  using ScaleTypes = ScaleList<SuperScales>;
  static constexpr int kDots = 8, kOutputs = 1, kSums = 2;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = kt::prepare_column_order;
  struct Tables {
    explicit Tables(const kt::PanelLayout&) {}
  };
  using Decoded = Ops::Bytes;

  template <int kDot>
  static inline __attribute__((always_inline)) Decoded dot(Ops::Bytes two_bits, Ops::Bytes third) {
    const Ops::Bytes low = Ops::template bits<0x03>(Ops::template shifted<2 * (kDot % 4)>(two_bits));
    return Ops::template with_bits<0x04>(low, Ops::template shifted<kDot - 2>(third));
  }
  static inline __attribute__((always_inline)) void decode(const Tables&, Cursor chunk, int slice,
                                                           Decoded (&out)[8][1]) {
    const Ops::Bytes third = word(chunk, 2, slice);
    const Ops::Bytes w0 = word(chunk, 0, slice), w1 = word(chunk, 1, slice);
    out[0][0] = dot<0>(w0, third);
    out[1][0] = dot<1>(w0, third);
    out[2][0] = dot<2>(w0, third);
    out[3][0] = dot<3>(w0, third);
    out[4][0] = dot<4>(w1, third);
    out[5][0] = dot<5>(w1, third);
    out[6][0] = dot<6>(w1, third);
    out[7][0] = dot<7>(w1, third);
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(const Decoded& bytes) {
    return Ops::unsigned_weights(bytes);
  }
};
