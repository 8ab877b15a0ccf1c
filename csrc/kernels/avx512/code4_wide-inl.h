// 4-bit codes straight to fp32: VPERMPS looks up in 16 values by the low four bits of each lane. Every second shift is
// a load that starts some bytes later, which costs no port of the arithmetic. (Emerald Rapids, 2
// threads, 2026-11-21, variant avx512, shape S, 1 / 16 tokens: 1.10 / 1.04 times as fast with RAWINT4 as by way of
// pairs of bf16, 1.16 / 1.16 with NVFP4.)

struct Codes4Wide : OnePlane<8, 128> {
  static constexpr bool kScaled = true;
  using ScaleTypes = Codes4::ScaleTypes;
  static constexpr float kSumFactor = 1;
  static constexpr int kDots = 4, kOutputs = 1;
  static constexpr void (*kPrepareRow)(const kt::PrepareArgs&) = nullptr;
  struct Tables {
    __m512 values;
    explicit Tables(const kt::PanelLayout& layout) : values(Avx512::from_bf16(layout.table)) {}
  };
  using Decoded = Avx512::Weights;

  // Bytes of a word (formats/code4.h): columns 0|2, 4|6, 1|3, 5|7 in low|high nibbles.
  static inline __attribute__((always_inline)) void decode(const Tables& t, Cursor chunk, int slice,
                                                           Decoded (&out)[4][1]) {
    const uint8_t* words = chunk + slice * kSliceBytes;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512i even = _mm512_loadu_si512(words + i);
      const __m512i odd = _mm512_loadu_si512(words + i + 2);
      out[2 * i][0] = {_mm512_permutexvar_ps(even, t.values), _mm512_permutexvar_ps(odd, t.values)};
      out[2 * i + 1][0] = {_mm512_permutexvar_ps(_mm512_srli_epi32(even, 4), t.values),
                           _mm512_permutexvar_ps(_mm512_srli_epi32(odd, 4), t.values)};
    }
  }
  static inline __attribute__((always_inline)) Avx512::Weights weights(const Decoded& w) { return w; }
};
