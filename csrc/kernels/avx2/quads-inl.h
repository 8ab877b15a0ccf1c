// Four 32-bit words of eight rows, as a vector of rows for each word.
static inline __attribute__((always_inline)) void load_quads(const void* first, size_t stride, __m256i (&words)[4]) {
  const uint8_t* row = static_cast<const uint8_t*>(first);
  const auto rows = [&](int r) __attribute__((always_inline)) {  // r and r + 4
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + r * stride));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + (r + 4) * stride));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  };
  const __m256i r0 = rows(0), r1 = rows(1), r2 = rows(2), r3 = rows(3);
  const __m256i low01 = _mm256_unpacklo_epi32(r0, r1), high01 = _mm256_unpackhi_epi32(r0, r1);
  const __m256i low23 = _mm256_unpacklo_epi32(r2, r3), high23 = _mm256_unpackhi_epi32(r2, r3);
  words[0] = _mm256_unpacklo_epi64(low01, low23);
  words[1] = _mm256_unpackhi_epi64(low01, low23);
  words[2] = _mm256_unpacklo_epi64(high01, high23);
  words[3] = _mm256_unpackhi_epi64(high01, high23);
}
