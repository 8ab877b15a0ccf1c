// Panels decoded to bf16 and transposed, on AVX2 + FMA: decode-inl.h.
#include <immintrin.h>

#include "kernels/kernel_set.h"
#include "kernels/training.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"

struct Ops : Avx2 {
  static inline void pack_pairs(Vec even, Vec odd, uint8_t* to) {
    const __m256i high = _mm256_slli_epi32(bf16_bits(odd), 16);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_or_si256(bf16_bits(even), high));
  }
};

#include "kernels/scales-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/codes-inl.h"

#include "kernels/avx2/e4m3-inl.h"

#include "kernels/panel-inl.h"

#include "kernels/decode-inl.h"

// A chunk as 16 quadwords, (column 0, column 1) of two rows each. Turned within themselves, two rows of a column stand
// side by side, and the block is a matrix of 16 x 16 quadwords to be transposed, 4 x 4 at a time.
inline void four_by_four(const uint8_t* from, uint8_t* to) {
  constexpr size_t kChunk = 128;
  const __m256i turn = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                        0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  __m256i a[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(from + i * kChunk)), turn);
  }
  const __m256i even = _mm256_unpacklo_epi64(a[0], a[1]), odd = _mm256_unpackhi_epi64(a[0], a[1]);
  const __m256i even_more = _mm256_unpacklo_epi64(a[2], a[3]), odd_more = _mm256_unpackhi_epi64(a[2], a[3]);
  const auto put = [&](int row, __m256i v) __attribute__((always_inline)) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + row * kChunk), v);
  };
  put(0, _mm256_permute2x128_si256(even, even_more, 0x20));
  put(1, _mm256_permute2x128_si256(odd, odd_more, 0x20));
  put(2, _mm256_permute2x128_si256(even, even_more, 0x31));
  put(3, _mm256_permute2x128_si256(odd, odd_more, 0x31));
}

void transpose(const uint8_t* from, uint8_t* to) {
  for (size_t chunks = 0; chunks < 16; chunks += 4) {
    for (size_t quads = 0; quads < 16; quads += 4) {
      four_by_four(from + chunks * 128 + quads * 8, to + quads * 128 + chunks * 8);
    }
  }
}
}  // namespace

constexpr kt::DecodeKernels kt::kDecodeAvx2 = {DecodePanel<Ops, CodesE4m3>::run, DecodePanel<Ops, Codes4>::run,
                                               DecodePanel<Ops, Codes8>::run, transpose};
