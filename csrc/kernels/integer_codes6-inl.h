// 6-bit codes for int8 activations: weights are bytes, four columns of a row in each 32-bit lane (formats/codes/code6.h
// has the picture). Included before gemm-inl.h, with `Ops` defined (see planes-inl.h for the contract). Tables::offset
// is what stored bytes have too much in every product with an activation: Ops::open() takes it back.
//
// The rows stand in the order of nibbles, 0 4 1 5 2 6 3 7.

struct IntegerCodes6 : Composite<16, 3> {
  static constexpr bool kScaled = true;
  using ScaleTypes = ScaleList<SuperScales>;
  static constexpr int kDots = 4, kOutputs = 1;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = kt::prepare_nibble_order;
  struct Tables {
    explicit Tables(const kt::PanelLayout&) {}
  };
  using Decoded = Ops::Bytes;

  static inline __attribute__((always_inline)) void decode(const Tables&, Cursor chunk, int slice,
                                                           Decoded (&out)[4][1]) {
    constexpr int kHigh = 0x30;
    const Ops::Bytes high = word(chunk, 2, slice);
    const Ops::Bytes w0 = word(chunk, 0, slice), w1 = word(chunk, 1, slice);
    out[0][0] = Ops::template with_bits<kHigh>(Ops::low_nibbles(w0), Ops::template shifted<-4>(high));
    out[1][0] = Ops::template with_bits<kHigh>(Ops::high_nibbles(w0), Ops::template shifted<-2>(high));
    out[2][0] = Ops::template with_bits<kHigh>(Ops::low_nibbles(w1), high);
    out[3][0] = Ops::template with_bits<kHigh>(Ops::high_nibbles(w1), Ops::template shifted<2>(high));
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(const Decoded& bytes) {
    return Ops::unsigned_weights(bytes);
  }
};
