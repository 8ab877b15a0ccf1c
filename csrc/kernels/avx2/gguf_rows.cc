// See kernels/gguf_rows.h.
#include "kernels/gguf_rows.h"

#include <immintrin.h>
#include <string.h>

#include "formats/gguf/blocks.h"
#include "formats/gguf/grids.h"
#include "kernels/kernel_sets.h"

namespace {
#include "formats/gguf/block_types-inl.h"

constexpr int kChunk = kt::kLargestBlock;  // numbers on the way from blocks to their type

// How fp32 numbers are written.
struct Target {
  uint8_t* at;
  int number_bytes;
  kt::ConvertFn store;
};

template <class T>
inline void decode_codes(const uint8_t* blocks, int columns, float* numbers) {
  int8_t codes[T::kColumns];
  float scale[T::kColumns / T::kGroup];
  float low[T::kColumns / T::kGroup];
  for (int begin = 0; begin < columns; begin += T::kColumns, blocks += T::kBytes, numbers += T::kColumns) {
    T::read(blocks, codes, scale, low);
    for (int k = 0; k < T::kColumns; k += 8) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + k));
      __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), _mm256_set1_ps(scale[k / T::kGroup]));
      if constexpr (T::kLow) v = _mm256_add_ps(v, _mm256_set1_ps(low[k / T::kGroup]));
      _mm256_storeu_ps(numbers + k, v);
    }
  }
}

// All rows are one run of blocks.
template <class T>
void decode_all(const kt::GgufRows& rows, const Target& target) {
  const int64_t count = rows.rows * rows.columns;
  float numbers[kChunk];
  for (int64_t i = 0; i < count; i += kChunk) {
    const int columns = static_cast<int>(count - i < kChunk ? count - i : kChunk);
    const uint8_t* blocks = rows.blocks + i / T::kColumns * T::kBytes;
    if constexpr (T::kColumns == 1) {
      T::numbers(blocks, columns, numbers);
    } else {
      decode_codes<T>(blocks, columns, numbers);
    }
    target.store(numbers, target.at + i * target.number_bytes, static_cast<size_t>(columns));
  }
}

template <class... Types>
void decode(const kt::GgufRows& rows, const Target& target, TypeList<Types...>) {
  ((Types::kId == rows.type && (decode_all<Types>(rows, target), true)) || ...);
}

}  // namespace

void kt::decode_gguf_rows_avx2(const GgufRows& rows, void* numbers, DType dtype) {
  const Target target = {static_cast<uint8_t*>(numbers), dtype == DType::kF32 ? 4 : 2,
                         kRowsAvx2.store_rows[static_cast<int>(dtype)]};
  decode(rows, target, CodeTypes());
  decode(rows, target, NumberTypes());
}
