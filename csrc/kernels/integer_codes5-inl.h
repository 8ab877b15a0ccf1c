// 5-bit codes for int8 activations: weights are bytes, four columns of a row in each 32-bit lane (formats/codes/code5.h
// has the picture). Included before gemm-inl.h, with `Ops` defined (see planes-inl.h for the contract). Tables::offset
// is what stored bytes have too much in every product with an activation: Ops::open() takes it back.
//
// The rows stand in the order of nibbles, 0 4 1 5 2 6 3 7.

struct IntegerCodes5 : Composite<32, 5> {
  static constexpr bool kScaled = true;
  using ScaleTypes = ScaleList<F16Scales, F16MinScales, SuperMinScales>;
  static constexpr int kDots = 8, kOutputs = 1;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = kt::prepare_nibble_order;
  struct Tables {
    explicit Tables(const kt::PanelLayout&) {}
  };
  using Decoded = Ops::Bytes;

  template <int kDot>
  static inline __attribute__((always_inline)) Decoded dot(Ops::Bytes words, Ops::Bytes fifth) {
    const Ops::Bytes low = kDot % 2 == 0 ? Ops::low_nibbles(words) : Ops::high_nibbles(words);
    return Ops::template with_bits<0x10>(low, Ops::template shifted<kDot - 4>(fifth));
  }
  static inline __attribute__((always_inline)) void decode(const Tables&, Cursor chunk, int slice,
                                                           Decoded (&out)[8][1]) {
    const Ops::Bytes fifth = word(chunk, 4, slice);
    const Ops::Bytes w0 = word(chunk, 0, slice), w1 = word(chunk, 1, slice);
    const Ops::Bytes w2 = word(chunk, 2, slice), w3 = word(chunk, 3, slice);
    out[0][0] = dot<0>(w0, fifth);
    out[1][0] = dot<1>(w0, fifth);
    out[2][0] = dot<2>(w1, fifth);
    out[3][0] = dot<3>(w1, fifth);
    out[4][0] = dot<4>(w2, fifth);
    out[5][0] = dot<5>(w2, fifth);
    out[6][0] = dot<6>(w3, fifth);
    out[7][0] = dot<7>(w3, fifth);
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(const Decoded& bytes) {
    return Ops::unsigned_weights(bytes);
  }
};
