// Panels decoded to bf16 and transposed, on AVX512 (F, BW, VL, DQ): decode-inl.h.
#include <immintrin.h>

#include "kernels/kernel_set.h"
#include "kernels/training.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"

struct Ops : Avx512 {
  static inline void pack_pairs(Vec even, Vec odd, uint8_t* to) {
    const __m512i high = _mm512_slli_epi32(bf16_bits(odd), 16);
    _mm512_store_si512(to, _mm512_or_si512(bf16_bits(even), high));
  }
};

#include "kernels/scales-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/codes-inl.h"

#include "kernels/avx512/e4m3-inl.h"

#include "kernels/panel-inl.h"

#include "kernels/decode-inl.h"

// A chunk as 16 quadwords, (column 0, column 1) of two rows each. Turned within themselves, two rows of a column stand
// side by side, and the block is a matrix of 16 x 16 quadwords to be transposed, 8 x 8 at a time.
inline void eight_by_eight(const uint8_t* from, uint8_t* to) {
  constexpr size_t kChunk = 128;
  const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  __m512i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm512_shuffle_epi8(_mm512_load_si512(from + i * kChunk), turn);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 1]);      // rows i, i + 1 of columns 0 2 4 6
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 1]);  // of columns 1 3 5 7
  }
  for (int odd = 0; odd < 2; ++odd) {
    const __m512i low = _mm512_shuffle_i64x2(b[odd], b[2 + odd], 0x88);           // columns 0 4 of rows 0..3
    const __m512i high = _mm512_shuffle_i64x2(b[odd], b[2 + odd], 0xDD);          // columns 2 6
    const __m512i low_more = _mm512_shuffle_i64x2(b[4 + odd], b[6 + odd], 0x88);  // of rows 4..7
    const __m512i high_more = _mm512_shuffle_i64x2(b[4 + odd], b[6 + odd], 0xDD);
    _mm512_store_si512(to + odd * kChunk, _mm512_shuffle_i64x2(low, low_more, 0x88));
    _mm512_store_si512(to + (2 + odd) * kChunk, _mm512_shuffle_i64x2(high, high_more, 0x88));
    _mm512_store_si512(to + (4 + odd) * kChunk, _mm512_shuffle_i64x2(low, low_more, 0xDD));
    _mm512_store_si512(to + (6 + odd) * kChunk, _mm512_shuffle_i64x2(high, high_more, 0xDD));
  }
}

void transpose(const uint8_t* from, uint8_t* to) {
  for (size_t chunks = 0; chunks < 16; chunks += 8) {
    for (size_t quads = 0; quads < 16; quads += 8) {
      eight_by_eight(from + chunks * 128 + quads * 8, to + quads * 128 + chunks * 8);
    }
  }
}
}  // namespace

constexpr kt::DecodeKernels kt::kDecodeAvx512 = {DecodePanel<Ops, CodesE4m3>::run, DecodePanel<Ops, Codes4>::run,
                                                 DecodePanel<Ops, Codes8>::run, transpose};
