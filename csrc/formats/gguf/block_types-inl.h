// One definition of every ggml type: how a block of it is read. Text that formats/ and kernels/ include in an anonymous
// namespace (kernels once per set of -m flags), after <stdint.h>, <string.h>, formats/gguf/blocks.h and grids.h, and
// <immintrin.h> where there are -m flags.
//
// Types of codes (block_types_32-inl.h, _k-inl.h, _iq-inl.h, _ternary-inl.h) have
//   kName, kId (ggml's number), kColumns, kBytes    of a block
//   kGroup                                          columns that share a scale and a low
//   kLow                                            whether there are lows that are not 0
//   kRepacked                                       whether panels of integers hold it: then there is parts()
//   read(block, BlockValues&)                       exactly what the format defines, NaN and infinity included
//   parts(block, BlockParts&)                       the same as it is stored; code = stored - kOffset or kTable[stored]
// Numbers (at the end of this file) have kName, kId, kColumns = 1, kBytes and number(bytes).
//
// Blocks may stand at any address. All words are little-endian.

template <class Word>
static inline Word word_at(const uint8_t* bytes) {
  Word word;
  memcpy(&word, bytes, sizeof(word));
  return word;
}

static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// IEEE half.
static inline float half(uint16_t bits) {
#ifdef __F16C__
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t rest = bits & 0x7FFF;
  if (rest >= 0x7C00) return float_of(sign | 0x7F800000 | rest << 13);
  if (rest >= 0x0400) return float_of(sign | ((rest << 13) + ((127 - 15) << 23)));
  const float subnormal = static_cast<float>(rest) * 0x1p-24f;
  return sign != 0 ? -subnormal : subnormal;
#endif
}
static inline float half_at(const uint8_t* bytes) { return half(word_at<uint16_t>(bytes)); }

// out[i] = table[index[i]] for 16 indices up to 15.
static inline void look_up(const int8_t (&table)[16], const uint8_t* index, int8_t* out) {
#ifdef __SSSE3__
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  const __m128i places = _mm_loadu_si128(reinterpret_cast<const __m128i*>(index));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(values, places));
#else
  for (int i = 0; i < 16; ++i) out[i] = table[index[i]];
#endif
}

// Nibbles of `count` bytes, the low ones first, each less kLess.
template <int kLess, int kCount>
static inline __attribute__((always_inline)) void nibbles(const uint8_t* from, uint8_t* __restrict out) {
  for (int i = 0; i < kCount; ++i) {
    out[i] = static_cast<uint8_t>((from[i] & 15) - kLess);
    out[kCount + i] = static_cast<uint8_t>((from[i] >> 4) - kLess);
  }
}

// read() and parts() of a type that has unpack<kLess>(block, codes), the stored codes less kLess, and scales(block,
// BlockScales&).
template <class T, int kColumns, int kGroup>
struct RepackedType {
  static constexpr bool kRepacked = true;
  static constexpr int kGroups = kColumns / kGroup;

  static inline void read(const uint8_t* block, kt::BlockValues<kColumns, kGroups>& values) {
    T::template unpack<T::kOffset>(block, reinterpret_cast<uint8_t*>(values.codes));
    kt::BlockScales scales;
    T::scales(block, scales);
    const float d = half(scales.d);
    const float dmin = T::kLow ? half(scales.dmin) : 0;
    for (int g = 0; g < kGroups; ++g) {
      if constexpr (kGroups == 1) {
        values.scale[g] = d;
        values.low[g] = dmin;
      } else {
        values.scale[g] = d * static_cast<float>(scales.sc[g]);
        values.low[g] = T::kLow ? -(dmin * static_cast<float>(scales.m[g])) : 0;
      }
    }
  }

  static inline void parts(const uint8_t* block, kt::BlockParts& parts) {
    T::template unpack<0>(block, parts.codes);
    T::scales(block, parts);
  }
};

#include "formats/gguf/block_types_32-inl.h"

#include "formats/gguf/block_types_k-inl.h"

#include "formats/gguf/block_types_iq-inl.h"

#include "formats/gguf/block_types_ternary-inl.h"

struct F32 {
  static constexpr const char* kName = "F32";
  static constexpr int kId = 0, kColumns = 1, kBytes = 4;
  static inline float number(const uint8_t* bytes) { return float_of(word_at<uint32_t>(bytes)); }
};

struct F16 {
  static constexpr const char* kName = "F16";
  static constexpr int kId = 1, kColumns = 1, kBytes = 2;
  static inline float number(const uint8_t* bytes) { return half_at(bytes); }
};

struct Bf16 {
  static constexpr const char* kName = "BF16";
  static constexpr int kId = 30, kColumns = 1, kBytes = 2;
  static inline float number(const uint8_t* bytes) {
    return float_of(static_cast<uint32_t>(word_at<uint16_t>(bytes)) << 16);
  }
};

template <class... Types>
struct TypeList {};
using CodeTypes = TypeList<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S,
                           IQ4_NL, IQ3_S, IQ2_S, IQ4_XS, IQ1_M, TQ1_0, TQ2_0, MXFP4, NVFP4>;
using NumberTypes = TypeList<F32, F16, Bf16>;
