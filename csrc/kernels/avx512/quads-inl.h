// Four 32-bit words of sixteen rows, as a vector of rows for each word.
static inline __attribute__((always_inline)) void load_quads(const void* first, size_t stride, __m512i (&words)[4]) {
  const uint8_t* row = static_cast<const uint8_t*>(first);
  const auto quad = [&](int r) __attribute__((always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + r * stride));
  };
  const auto rows = [&](int r) __attribute__((always_inline)) {  // r, r + 4, r + 8, r + 12
    __m512i v = _mm512_castsi128_si512(quad(r));
    v = _mm512_mask_broadcast_i32x4(v, 0x00F0, quad(r + 4));
    v = _mm512_mask_broadcast_i32x4(v, 0x0F00, quad(r + 8));
    return _mm512_mask_broadcast_i32x4(v, 0xF000, quad(r + 12));
  };
  const __m512i r0 = rows(0), r1 = rows(1), r2 = rows(2), r3 = rows(3);
  const __m512i low01 = _mm512_unpacklo_epi32(r0, r1), high01 = _mm512_unpackhi_epi32(r0, r1);
  const __m512i low23 = _mm512_unpacklo_epi32(r2, r3), high23 = _mm512_unpackhi_epi32(r2, r3);
  words[0] = _mm512_unpacklo_epi64(low01, low23);
  words[1] = _mm512_unpackhi_epi64(low01, low23);
  words[2] = _mm512_unpacklo_epi64(high01, high23);
  words[3] = _mm512_unpackhi_epi64(high01, high23);
}
