// float8_e4m3fn on AVX2 + F16C: shifted into the place of an IEEE half, e4m3 has the same bits but an exponent bias
// smaller by 8, so the conversion from half gives 2^-8 of the value, subnormals included. (As a half, NaN is a number;
// PanelHeader::nan_rows takes care of it.)
//
// With one token this decoding sets the pace, not the memory. 32 codes take 16 vector instructions besides the load: 2
// unpacks, 2 shifts, 2 masks, 2 extracts, 4 VCVTPH2PS of two operations each, 4 FMA: 20 operations, about 38 on Zen 1,
// whose units are 128 bits wide. Widening and FMA alone, which no decoding avoids, are 8 (16). Others, in cycles per 32
// codes from L2 (Zen 4, 1 thread, 2026-11-30; this one takes 6.4):
//   the same with the halves through memory instead of extracts                           6.5
//   the same 128 bits at a time                                                           7.6
//   bf16 by VPSHUFB of the upper nibble and a shift of the lower (15 operations)          4.8, but wrong where the code
//   pairs of bf16 by one VPSHUFB of each 16 bytes, shift, mask, or, two widenings (16)    5.2, is subnormal or zero
//   the latter with a test of every 64 codes for these, and VCVTPH2PS for them            6.4
// Correcting subnormals without a branch takes 9 more operations than the look-up (24). Shifting straight to fp32 makes
// subnormals of fp32, which Intel multiplies in microcode.

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
  static inline __attribute__((always_inline)) __m256i halves(__m256i high_bytes) {
    return _mm256_and_si256(_mm256_srai_epi16(high_bytes, 1), _mm256_set1_epi16(static_cast<short>(0xBFFF)));
  }

  // A slice is 16 rows x 2 columns: in each 128-bit lane eight rows of the first column, then of the second.
  using Decoded = Ops::Weights;
  static inline __attribute__((always_inline)) void decode(const Tables&, Cursor chunk, int slice,
                                                           Decoded (&out)[1][2]) {
    const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(chunk + slice * kSliceBytes));
    const __m256i even = halves(_mm256_unpacklo_epi8(_mm256_setzero_si256(), codes));
    const __m256i odd = halves(_mm256_unpackhi_epi8(_mm256_setzero_si256(), codes));
    out[0][0] = {_mm256_cvtph_ps(_mm256_castsi256_si128(even)), _mm256_cvtph_ps(_mm256_castsi256_si128(odd))};
    out[0][1] = {_mm256_cvtph_ps(_mm256_extracti128_si256(even, 1)), _mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1))};
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(const Decoded& w) { return w; }
};
