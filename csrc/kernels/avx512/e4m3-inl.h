// float8_e4m3fn on AVX512 (F, BW): shifted into the place of an IEEE half, e4m3 has the same bits but an exponent bias
// smaller by 8, so the conversion from half gives 2^-8 of the value, subnormals included. (As a half, NaN is a number;
// PanelHeader::nan_rows takes care of it.)

struct CodesE4m3 : OnePlane<2, 64> {
  static constexpr bool kScaled = true;
  using ScaleTypes = ScaleList<ScalarScales, F32Scales, E8m0Scales>;
  static constexpr float kSumFactor = 256;
  static constexpr int kDots = 1, kOutputs = 2;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = nullptr;
  struct Tables {
    explicit Tables(const kt::PanelLayout&) {}
  };

  // Codes in the high bytes of 16-bit lanes -> halves: s eeee mmm 0.. -> s 0 eeee mmm 0...
  static inline __attribute__((always_inline)) __m512i halves(__m512i high_bytes) {
    return _mm512_and_si512(_mm512_srai_epi16(high_bytes, 1), _mm512_set1_epi16(static_cast<short>(0xBFFF)));
  }

  // A slice is the chunk: in each 128-bit lane eight rows of the first column, then of the second.
  using Decoded = Ops::Weights;
  static inline __attribute__((always_inline)) void decode(const Tables&, Cursor chunk, int slice,
                                                           Decoded (&out)[1][2]) {
    const __m512i codes = _mm512_load_si512(chunk + slice * kSliceBytes);
    const __m512i even = halves(_mm512_unpacklo_epi8(_mm512_setzero_si512(), codes));
    const __m512i odd = halves(_mm512_unpackhi_epi8(_mm512_setzero_si512(), codes));
    out[0][0] = {_mm512_cvtph_ps(_mm512_castsi512_si256(even)), _mm512_cvtph_ps(_mm512_castsi512_si256(odd))};
    out[0][1] = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(even, 1)),
                 _mm512_cvtph_ps(_mm512_extracti64x4_epi64(odd, 1))};
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(const Decoded& w) { return w; }
};
