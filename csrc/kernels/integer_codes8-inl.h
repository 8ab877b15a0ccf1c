// Signed bytes for int8 activations: weights are bytes, four columns of a row in each 32-bit lane. Included before
// gemm-inl.h, with `Ops` defined (see planes-inl.h for the contract). Tables::offset is what stored bytes have too much
// in every product with an activation: Ops::open() takes it back.
//
// The rows stand in the order of the columns.

struct IntegerCodes8 : OnePlane<4, 128> {
  static constexpr bool kScaled = true;
  using ScaleTypes = ScaleList<F32Scales, F16Scales>;
  static constexpr int kDots = 1, kOutputs = 1;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = kt::prepare_column_order;
  struct Tables {
    explicit Tables(const kt::PanelLayout&) {}
  };
  using Decoded = Ops::Bytes;
  static inline __attribute__((always_inline)) void decode(const Tables&, Cursor chunk, int slice,
                                                           Decoded (&out)[1][1]) {
    out[0][0] = Ops::load_bytes(chunk + slice * kSliceBytes);
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(const Decoded& bytes) {
    return Ops::signed_weights(bytes);
  }
};
