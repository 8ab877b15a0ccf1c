// Codes that are fp32 numbers (planes-inl.h has the contract), for Ops whose Weights are two columns of fp32. Included
// before gemm-inl.h, with `Ops` defined.

// A chunk is two columns, of which a slice is the same rows.
struct CodesF32 : OnePlane<2, 256> {
  static constexpr bool kScaled = false;
  using ScaleTypes = ScaleList<NoScales>;
  static constexpr float kSumFactor = 1;
  static constexpr int kSlices = kChunkBytes / 2 / kSliceBytes;
  static constexpr int kDots = 1, kOutputs = 1;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = nullptr;
  struct Tables {
    explicit Tables(const kt::PanelLayout&) {}
  };
  using Decoded = Ops::Weights;
  static inline __attribute__((always_inline)) void decode(const Tables&, Cursor chunk, int slice,
                                                           Decoded (&out)[1][1]) {
    const auto* columns = reinterpret_cast<const float*>(chunk + slice * kSliceBytes);
    out[0][0] = {Ops::load(columns), Ops::load(columns + kt::kPanelRows)};
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(const Decoded& w) { return w; }
};
