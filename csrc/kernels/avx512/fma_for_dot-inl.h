// AVX512-BF16 where FMA beats VDPBF16PS, as on Intel: FMA on rows widened to fp32, with the same bits. (Emerald Rapids,
// 2 threads, 2026-11-21, shape S, speed over VDPBF16PS at 4 / 16 / 32 / 1024 tokens: FP8 1.06 / 1.08 / 1.13 / 1.71,
// RAWINT4 1.02 / 1.04 / 1.08 / 1.56, NVFP4 0.98 / 1.04 / 1.15 / 1.42; one token, whose pace the memory sets,
// 0.96-1.01.)

// VDPBF16PS is two fused multiply-adds, the second column first, that round to nearest, read denormals as zero and
// flush denormal results (Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2, VDPBF16PS; FMA gave the
// same bits for 25.6 million random lanes, any exponents, infinities and NaN among them: Emerald Rapids, 2026-11-21).
struct Avx512FmaDot : Avx512 {
  static inline Vec dot(Vec acc, const Weights& w, const float* a) {
    acc = _mm512_fmadd_ps(w.odd, _mm512_set1_ps(a[1]), acc);
    return _mm512_fmadd_ps(w.even, _mm512_set1_ps(a[0]), acc);
  }
};

// `Codes` for VDPBF16PS, `WideCodes` for FMA.
template <class Codes, class WideCodes>
struct FmaForDot {
  // Nothing is flushed, so FMA needs no flushing mode, while every activation is 0 or at least 2^-110: it is a multiple
  // of 2^-117 then, a decoded weight (e4m3, or a small integer or half) one of 2^-9, and so every sum one of 2^-126,
  // the least normal number.
  static constexpr int kLeastExponent = 127 - 110;

  using Wide = PanelGemm<Avx512FmaDot, WideCodes>;

  // Keeps widened rows, whose blocks are powers of two, from falling into the same sets of the L1.
  static constexpr int kPadding = 32;
  static size_t wide_stride(int k_count) { return (static_cast<size_t>(k_count) + kPadding) * sizeof(float); }

  // The wide rows stand behind the scratch of the multiplication.
  static size_t scratch_bytes(int tokens, int k_count) {
    return Wide::scratch_bytes(tokens, k_count) + tokens * wide_stride(k_count);
  }

  // Rows in fp32; false when one has an activation too small.
  static bool widen(const kt::GemmArgs& g, uint8_t* wide) {
    const __m512i one = _mm512_set1_epi16(1);
    const __m512i least = _mm512_set1_epi16((kLeastExponent << 7) - 1);
    __mmask32 too_small = 0;
    for (int t = 0; t < g.tokens; ++t) {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(g.a.data + t * g.a.stride);
      float* to = reinterpret_cast<float*>(wide + t * wide_stride(g.k_count));
      for (int k = 0; k < g.k_count; k += kt::kPanelK) {
        const __m512i row = _mm512_loadu_si512(from + k);
        const __m512i magnitude = _mm512_and_si512(row, _mm512_set1_epi16(0x7FFF));
        too_small |= _mm512_cmplt_epu16_mask(_mm512_sub_epi16(magnitude, one), least);  // 0 becomes the largest
        _mm512_storeu_ps(to + k, Ops::from_bf16(from + k));
        _mm512_storeu_ps(to + k + Ops::kLanes, Ops::from_bf16(from + k + Ops::kLanes));
      }
    }
    return too_small == 0;
  }

  static void many(const kt::GemmArgs& g) {
    static_assert(Codes::kScaled, "bf16 codes may be smaller than 2^-9");
    uint8_t* const rows = g.scratch + Wide::scratch_bytes(g.tokens, g.k_count);
    if (!widen(g, rows)) return PanelGemm<Ops, Codes>::any(g);
    kt::GemmArgs wide = g;
    wide.a = {rows, nullptr, wide_stride(g.k_count)};
    Wide::any(wide);
  }
};

// One token by VDPBF16PS, which reads rows as they are, more by FMA.
template <class Codes, class WideCodes>
constexpr kt::KernelSet fma_for_dot(const char* name) {
  using Gemm = FmaForDot<Codes, WideCodes>;
  return {name,          Ops::kActivation,    1,       PanelGemm<Ops, Codes>::few, Gemm::many,
          kt::kBlocking, Gemm::scratch_bytes, nullptr, &kt::kRowsAvx512Bf16};
}
