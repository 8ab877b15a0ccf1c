// Rows of int8 activations from rows of fp32, on AVX2: used by every kernel that multiplies int8 activations, whatever
// its instruction set, so that all multiply the same rows.
//
// Per step of int8_step_k columns, a RowGroup for every int8_sum_k of them: scale = max |x| / 127 (times the factor of
// the codes), code = x / that scale rounded to nearest even. A step with a number that is not finite gets the scale NaN
// and codes 0: its row's results are NaN, and no other's.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {

// The least normal number: a step of smaller ones (or zeros) has codes that fit all the same.
constexpr float kLeastScale = 1.17549435e-38f;

inline float largest_of(__m256 v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Codes of 8 columns as 16-bit integers.
inline __m128i codes_of(const float* x, __m256 scale) {
  const __m256i codes = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(x), scale));
  return _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
}

// Codes of columns that share a sum, and what is known of them; a multiple of 16.
void prepare_sum(const kt::PanelLayout& layout, const float* x, int columns, __m128i order, float scale, uint8_t* data,
                 kt::RowGroup* group) {
  __m128i sums = _mm_setzero_si128();  // of positions 0, 1 | 2, 3 of every four
  for (int k = 0; k < columns; k += 16) {
    const __m128i codes =
        _mm_packs_epi16(codes_of(x + k, _mm256_set1_ps(scale)), codes_of(x + k + 8, _mm256_set1_ps(scale)));
    const __m128i ordered = _mm_shuffle_epi8(codes, order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data + k), ordered);
    sums = _mm_add_epi16(sums, _mm_maddubs_epi16(_mm_set1_epi8(1), ordered));
  }
  sums = _mm_add_epi16(sums, _mm_unpackhi_epi64(sums, sums));
  sums = _mm_add_epi16(sums, _mm_srli_si128(sums, 4));
  const int two = _mm_cvtsi128_si32(sums);
  const int first = static_cast<int16_t>(two), second = two >> 16;
  const int offset = layout.integer_offset;
  group->scale = scale * layout.integer_factor;
  group->total = static_cast<float>(first + second);
  group->open = -offset * (first + second);
  group->opens[0] = static_cast<int16_t>(-offset * first);
  group->opens[1] = static_cast<int16_t>(-offset * second);
}

// One step, whose sums are `sum_k` columns each.
void prepare_step(const kt::PanelLayout& layout, const float* x, int columns, __m128i order, uint8_t* data,
                  kt::RowGroup* groups) {
  const int sum_k = layout.int8_sum_k;
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  __m256 largest = _mm256_setzero_ps();
  for (int k = 0; k < columns; k += 8) {
    // A NaN has the largest bits of all: as integers, max keeps it.
    const __m256i bits = _mm256_castps_si256(_mm256_and_ps(_mm256_loadu_ps(x + k), magnitude));
    largest = _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(largest), bits));
  }
  alignas(32) int32_t bits[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(bits), _mm256_castps_si256(largest));
  for (int32_t b : bits) {
    if (b >= 0x7F800000) {
      __builtin_memset(data, 0, columns);
      for (int k = 0; k < columns; k += sum_k) *groups++ = {__builtin_nanf(""), 0, 0, {0, 0}};
      return;
    }
  }
  const float least = largest_of(largest) / 127;
  const float scale = least > kLeastScale ? least : kLeastScale;
  for (int k = 0; k < columns; k += sum_k) {
    prepare_sum(layout, x + k, columns - k < sum_k ? columns - k : sum_k, order, scale, data + k, groups++);
  }
}

void prepare(const kt::PrepareArgs& p, __m128i order) {
  const int step_k = p.layout->int8_step_k, sum_k = p.layout->int8_sum_k;
  kt::RowGroup* groups = reinterpret_cast<kt::RowGroup*>(p.groups);
  for (int k = 0; k < p.layout->k_padded; k += step_k, groups += step_k / sum_k) {
    const int columns = p.layout->k_padded - k < step_k ? p.layout->k_padded - k : step_k;
    prepare_step(*p.layout, p.from + k, columns, order, p.data + k, groups);
  }
}

}  // namespace

void kt::prepare_column_order(const PrepareArgs& p) {
  prepare(p, _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

void kt::prepare_nibble_order(const PrepareArgs& p) {
  prepare(p, _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
}
