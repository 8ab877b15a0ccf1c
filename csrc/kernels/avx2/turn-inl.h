// Turning a square of 8 x 8 words around: rows become columns.

struct Turn {
  using Words = __m256i;
  static inline Words words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static inline Words words(Avx2::Vec v) { return _mm256_castps_si256(v); }
  static inline Avx2::Vec vec(Words w) { return _mm256_castsi256_ps(w); }
  // The bf16 numbers in the low and in the high halves.
  static inline Avx2::Vec low_bf16(Words w) { return vec(_mm256_slli_epi32(w, 16)); }
  static inline Avx2::Vec high_bf16(Words w) {
    return vec(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
  static inline void store_eight(float* p, Words w) { _mm256_storeu_ps(p, vec(w)); }

  static inline __attribute__((always_inline)) void turn(Words (&r)[8]) {
    Words fours[2][4];  // [rows 4g .. 4g + 3][column 4L + c in lane L]
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
      const Words a = _mm256_unpacklo_epi32(r[4 * g], r[4 * g + 1]), b = _mm256_unpackhi_epi32(r[4 * g], r[4 * g + 1]);
      const Words c = _mm256_unpacklo_epi32(r[4 * g + 2], r[4 * g + 3]);
      const Words d = _mm256_unpackhi_epi32(r[4 * g + 2], r[4 * g + 3]);
      fours[g][0] = _mm256_unpacklo_epi64(a, c);
      fours[g][1] = _mm256_unpackhi_epi64(a, c);
      fours[g][2] = _mm256_unpacklo_epi64(b, d);
      fours[g][3] = _mm256_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      r[c] = _mm256_permute2x128_si256(fours[0][c], fours[1][c], 0x20);
      r[4 + c] = _mm256_permute2x128_si256(fours[0][c], fours[1][c], 0x31);
    }
  }
};
