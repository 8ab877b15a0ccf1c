// float8_e4m3fn on AVX512-BF16 with VBMI: two look-ups in tables of 128 bytes give the high and the low byte of each
// code's bf16 value (which is exact); the sign is put back afterwards.

// bf16 of the 128 codes without a sign: 0 eeee mmm, bias 7.
struct E4m3Tables {
  alignas(64) uint8_t low[128] = {};
  alignas(64) uint8_t high[128] = {};
  constexpr E4m3Tables() {
    for (int code = 0; code < 128; ++code) {
      int exponent = code >> 3;
      int mantissa = code & 7;
      int bits = 0;
      if (code == 127) {
        bits = 0x7FC0;  // NaN
      } else if (exponent > 0) {
        bits = (exponent + 120) << 7 | mantissa << 4;
      } else if (mantissa > 0) {  // mantissa * 2^-9, normalised
        exponent = 121;
        while (mantissa < 8) {
          mantissa *= 2;
          --exponent;
        }
        bits = exponent << 7 | (mantissa & 7) << 4;
      }
      low[code] = static_cast<uint8_t>(bits);
      high[code] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
constexpr E4m3Tables kE4m3Tables;

// Within a chunk: pairs of columns side by side, and rows so that unpacking low and high bytes gives rows
// 0..15, 16..31.
struct E4m3Order {
  alignas(64) uint8_t from[64] = {};
  constexpr E4m3Order() {
    for (int lane = 0; lane < 4; ++lane) {
      for (int i = 0; i < 16; ++i) {
        const int row = i / 8 * 16 + lane * 4 + i % 8 / 2;
        from[lane * 16 + i] = static_cast<uint8_t>(row / 8 * 16 + i % 2 * 8 + row % 8);
      }
    }
  }
};
constexpr E4m3Order kE4m3Order;

struct CodesE4m3 : OnePlane<2, 64> {
  static constexpr bool kScaled = true;
  using ScaleTypes = ScaleList<ScalarScales, F32Scales, E8m0Scales>;
  static constexpr float kSumFactor = 1;
  static constexpr int kDots = 1, kOutputs = 2;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = nullptr;
  struct Tables {
    __m512i order, low[2], high[2];
    explicit Tables(const kt::PanelLayout&)
        : order(_mm512_load_si512(kE4m3Order.from)),
          low{_mm512_load_si512(kE4m3Tables.low), _mm512_load_si512(kE4m3Tables.low + 64)},
          high{_mm512_load_si512(kE4m3Tables.high), _mm512_load_si512(kE4m3Tables.high + 64)} {}
  };
  using Decoded = Ops::Pairs;
  static inline __attribute__((always_inline)) void decode(const Tables& t, Cursor chunk, int slice,
                                                           Decoded (&out)[1][2]) {
    const __m512i codes = _mm512_permutexvar_epi8(t.order, _mm512_load_si512(chunk + slice * kSliceBytes));
    const __m512i low = _mm512_permutex2var_epi8(t.low[0], codes, t.low[1]);  // by bits 0..6
    const __m512i magnitude = _mm512_permutex2var_epi8(t.high[0], codes, t.high[1]);
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, codes, _mm512_set1_epi8(-128), 0xF8);  // a | (b & c)
    out[0][0] = _mm512_unpacklo_epi8(low, high);
    out[0][1] = _mm512_unpackhi_epi8(low, high);
  }
  static inline __attribute__((always_inline)) Ops::Weights weights(Decoded pairs) { return Ops::widen(pairs); }
};
