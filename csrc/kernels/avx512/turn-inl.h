// Turning a square of 16 x 16 words around: rows become columns.

struct Turn {
  using Words = __m512i;
  static inline Words words(const void* p) { return _mm512_loadu_si512(p); }
  static inline Words words(Avx512::Vec v) { return _mm512_castps_si512(v); }
  static inline Avx512::Vec vec(Words w) { return _mm512_castsi512_ps(w); }
  // The bf16 numbers in the low and in the high halves.
  static inline Avx512::Vec low_bf16(Words w) { return vec(_mm512_slli_epi32(w, 16)); }
  static inline Avx512::Vec high_bf16(Words w) {
    return vec(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
  static inline void store_eight(float* p, Words w) { _mm256_storeu_ps(p, _mm512_castps512_ps256(vec(w))); }

  static inline __attribute__((always_inline)) void turn(Words (&r)[16]) {
    Words fours[4][4];  // [rows 4g .. 4g + 3][column 4L + c in lane L]
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const Words a = _mm512_unpacklo_epi32(r[4 * g], r[4 * g + 1]), b = _mm512_unpackhi_epi32(r[4 * g], r[4 * g + 1]);
      const Words c = _mm512_unpacklo_epi32(r[4 * g + 2], r[4 * g + 3]);
      const Words d = _mm512_unpackhi_epi32(r[4 * g + 2], r[4 * g + 3]);
      fours[g][0] = _mm512_unpacklo_epi64(a, c);
      fours[g][1] = _mm512_unpackhi_epi64(a, c);
      fours[g][2] = _mm512_unpacklo_epi64(b, d);
      fours[g][3] = _mm512_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const Words a = _mm512_shuffle_i32x4(fours[0][c], fours[1][c], 0x88);
      const Words b = _mm512_shuffle_i32x4(fours[2][c], fours[3][c], 0x88);
      const Words d = _mm512_shuffle_i32x4(fours[0][c], fours[1][c], 0xDD);
      const Words e = _mm512_shuffle_i32x4(fours[2][c], fours[3][c], 0xDD);
      r[c] = _mm512_shuffle_i32x4(a, b, 0x88);
      r[8 + c] = _mm512_shuffle_i32x4(a, b, 0xDD);
      r[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
      r[12 + c] = _mm512_shuffle_i32x4(d, e, 0xDD);
    }
  }
};
