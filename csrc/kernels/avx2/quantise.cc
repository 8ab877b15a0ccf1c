// The converter's quantiser on AVX2: a row is decoded to fp32 once, each group's largest magnitude taken on the way.
#include "kernels/quantise.h"

#include <immintrin.h>
#include <string.h>

namespace {

using kt::QuantiseArgs;

constexpr int64_t kLanes = 8;
constexpr int32_t kInfinity = 0x7F800000;

template <kt::NumberType type>
struct Numbers;

template <>
struct Numbers<kt::NumberType::kBf16> {
  static constexpr int64_t kBytes = 2;
  static __m256 load(const uint8_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
};

template <>
struct Numbers<kt::NumberType::kF16> {
  static constexpr int64_t kBytes = 2;
  static __m256 load(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
};

template <>
struct Numbers<kt::NumberType::kF32> {
  static constexpr int64_t kBytes = 4;
  static __m256 load(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
};

template <>
struct Numbers<kt::NumberType::kE4m3> {
  static constexpr int64_t kBytes = 1;
  // The code's bits as IEEE half read 2^-8 of the value; 0x7F is NaN, which half must be told.
  static __m256 load(const uint8_t* p) {
    const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 7);
    const __m128i largest = _mm_set1_epi16(0x3F80);
    const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(wide, largest), largest);
    const __m128i half = _mm_and_si128(wide, _mm_set1_epi16(static_cast<short>(0xBF80)));
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7E00)))),
                         _mm256_set1_ps(256.0f));
  }
};

inline int32_t largest_lane(__m256i v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
  return _mm_cvtsi128_si32(m);
}

// Stores eight numbers and returns the larger magnitudes. They compare like the integers of their bits, and NaN is
// above infinity there.
inline __m256i keep(__m256 numbers, float* to, __m256i largest) {
  _mm256_storeu_ps(to, numbers);
  return _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(numbers), _mm256_set1_epi32(0x7FFFFFFF)));
}

// Decodes `count` columns from `first` on, all of one scale, and returns the bits of the largest magnitudes.
template <class Type>
inline __m256i decode(const uint8_t* numbers, float* row, float scale, int64_t first, int64_t count) {
  const __m256 factor = _mm256_set1_ps(scale);
  __m256i largest = _mm256_setzero_si256();
  const int64_t whole = first + count / kLanes * kLanes, rest = count % kLanes;
  for (int64_t c = first; c < whole; c += kLanes) {
    largest = keep(_mm256_mul_ps(Type::load(numbers + c * Type::kBytes), factor), row + c, largest);
  }
  if (rest != 0) {
    uint8_t padded[kLanes * 4] = {};
    memcpy(padded, numbers + whole * Type::kBytes, static_cast<size_t>(rest * Type::kBytes));
    largest = keep(_mm256_mul_ps(Type::load(padded), factor), row + whole, largest);
  }
  return largest;
}

// The same for columns of several scales; a number without a scale is multiplied by 1.
template <class Type>
inline int32_t decode_group(const uint8_t* numbers, const QuantiseArgs& args, int64_t r, int64_t first) {
  const kt::BlockScales& blocks = args.blocks;
  const int64_t end = first + args.group;
  if (blocks.scales == nullptr) return largest_lane(decode<Type>(numbers, args.row, 1.0f, first, args.group));
  const float* scales = blocks.scales + (blocks.first_row + r) / blocks.block_rows * blocks.per_row;
  __m256i largest = _mm256_setzero_si256();
  for (int64_t c = first; c < end;) {
    const int64_t block = c / blocks.block_columns;
    const int64_t next = (block + 1) * blocks.block_columns < end ? (block + 1) * blocks.block_columns : end;
    largest = _mm256_max_epi32(largest, decode<Type>(numbers, args.row, scales[block], c, next - c));
    c = next;
  }
  return largest_lane(largest);
}

// 32 codes in the order of their columns.
inline __m256i codes_of(const float* numbers, __m256 scale, __m256 limit) {
  const __m256 lowest = _mm256_sub_ps(_mm256_setzero_ps(), limit);
  __m256i words[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 q = _mm256_div_ps(_mm256_loadu_ps(numbers + kLanes * i), scale);
    words[i] = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(q, limit), lowest));
  }
  // The packs work within 128-bit halves; the permutation puts their dwords in order.
  const __m256i packed =
      _mm256_packs_epi16(_mm256_packs_epi32(words[0], words[1]), _mm256_packs_epi32(words[2], words[3]));
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

inline void store_int4(__m256i codes, uint8_t* out) {
  const __m256i nibbles = _mm256_add_epi8(codes, _mm256_set1_epi8(8));
  const __m256i pairs = _mm256_maddubs_epi16(nibbles, _mm256_set1_epi16(0x1001));  // low + 16 * high
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes));
}

// The row's decoded columns [first, first + count) to codes; the scratch holds zeros, or decoded columns of the next
// group, behind them.
inline void encode(const QuantiseArgs& args, int64_t first, int64_t count, float scale, uint8_t* out) {
  const bool pairs = args.codes == kt::IntegerCodes::kInt4;
  const __m256 limit = _mm256_set1_ps(pairs ? 7.0f : 127.0f);
  const __m256 divisor = _mm256_set1_ps(scale == 0.0f ? 1.0f : scale);
  for (int64_t c = first; c < first + count; c += kt::kQuantiseStep) {
    const __m256i codes = codes_of(args.row + c, divisor, limit);
    const int64_t columns = first + count - c < kt::kQuantiseStep ? first + count - c : kt::kQuantiseStep;
    uint8_t* place = out + (pairs ? c / 2 : c);
    alignas(32) uint8_t bytes[kt::kQuantiseStep];
    uint8_t* to = columns == kt::kQuantiseStep ? place : bytes;
    if (pairs) {
      store_int4(codes, to);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), codes);
    }
    if (to == bytes) memcpy(place, bytes, static_cast<size_t>(pairs ? columns / 2 : columns));
  }
}

template <class Type>
int64_t quantise(const QuantiseArgs& args) {
  const bool pairs = args.codes == kt::IntegerCodes::kInt4;
  const int64_t groups = args.columns / args.group;
  const size_t code_bytes = static_cast<size_t>(pairs ? args.columns / 2 : args.columns);
  memset(args.row + args.columns / kt::kQuantiseStep * kt::kQuantiseStep, 0,
         static_cast<size_t>(args.columns % kt::kQuantiseStep != 0) * kt::kQuantiseStep * sizeof(float));
  for (int64_t r = 0; r < args.rows; ++r) {
    const uint8_t* numbers = args.numbers + static_cast<size_t>(r) * args.row_bytes;
    for (int64_t g = 0; g < groups; ++g) {
      const int32_t bits = decode_group<Type>(numbers, args, r, g * args.group);
      if (bits >= kInfinity) return r;
      float largest;
      memcpy(&largest, &bits, sizeof largest);
      const float scale = largest / (pairs ? 7.0f : 127.0f);
      args.code_scales[r * groups + g] = scale;
      encode(args, g * args.group, args.group, scale, args.code_bytes + static_cast<size_t>(r) * code_bytes);
    }
  }
  return -1;
}

}  // namespace

int64_t kt::quantise_rows_avx2(const QuantiseArgs& args) {
  switch (args.type) {
    case NumberType::kBf16:
      return quantise<Numbers<NumberType::kBf16>>(args);
    case NumberType::kF16:
      return quantise<Numbers<NumberType::kF16>>(args);
    case NumberType::kF32:
      return quantise<Numbers<NumberType::kF32>>(args);
    case NumberType::kE4m3:
      return quantise<Numbers<NumberType::kE4m3>>(args);
  }
  return 0;
}
