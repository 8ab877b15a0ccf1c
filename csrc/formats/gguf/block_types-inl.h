// One definition of every ggml type: how a block of it is read. Text that formats/ and kernels/ include in an anonymous
// namespace (kernels once per set of -m flags), after <stdint.h>, <string.h>, formats/gguf/blocks.h and grids.h, and
// <immintrin.h> where there are -m flags.
//
// Types of codes (block_types_32-inl.h, _k-inl.h, _iq-inl.h, _ternary-inl.h) have
//   kName, kId (ggml's number), kColumns, kBytes    of a block
//   kGroup                                          columns that share a scale and a low
//   kLow                                            whether there are lows that are not 0
//   kRepacked                                       whether panels of integers hold it: then there is parts()
//   read(block, codes, scale, low)                  number of column k = scale[k / kGroup] * codes[k] + low[k /
//   kGroup],
//                                                   exactly what the format defines, NaN and infinity included: the
//                                                   product is exact in fp32, so there is one rounding at most; where
//                                                   kLow is false there is none, and low is not touched
//   parts(block, BlockParts&)                       the same as it is stored; code = stored - kOffset or kTable[stored]
// Numbers (at the end of this file) have kName, kId, kColumns = 1, kBytes and numbers(bytes, count, out).
//
// Blocks may stand at any address. All words are little-endian.

template <class Word>
static inline Word word_at(const uint8_t* bytes) {
  Word word;
  memcpy(&word, bytes, sizeof(word));
  return word;
}

// Vectors on every instruction set: loops over bytes are unrolled before they are vectorised (GCC 12), and end up
// scalar.
using Bytes16 = uint8_t __attribute__((vector_size(16)));
using Bytes32 = uint8_t __attribute__((vector_size(32)));
using Words2 = uint64_t __attribute__((vector_size(16)));

template <class Vector>
static inline void put(void* to, Vector value) {
  memcpy(to, &value, sizeof(value));
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

// table[index[i]] for indices up to 15.
static inline Bytes16 look_up(const int8_t (&table)[16], Bytes16 index) {
#ifdef __SSSE3__
  return (Bytes16)_mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)), (__m128i)index);
#else
  Bytes16 values;
  for (int i = 0; i < 16; ++i) values[i] = static_cast<uint8_t>(table[index[i]]);
  return values;
#endif
}

// The low nibbles of a vector of bytes, then the high ones, each less kLess.
template <class Vector, uint8_t kLess = 0>
static inline void nibbles(const uint8_t* from, void* out) {
  const Vector bytes = word_at<Vector>(from);
  put<Vector>(out, (bytes & 15) - kLess);
  put<Vector>(static_cast<uint8_t*>(out) + sizeof(Vector), (bytes >> 4) - kLess);
}

// read() and parts() of a type that has unpack<kLess>(block, codes), the stored codes less kLess, and scales(block,
// BlockScales&).
template <class T>
struct RepackedType {
  static constexpr bool kRepacked = true;

  static inline void read(const uint8_t* block, int8_t* codes, float* scale, float* low) {
    T::template unpack<T::kOffset>(block, reinterpret_cast<uint8_t*>(codes));
    kt::BlockScales scales;
    T::scales(block, scales);
    const float d = half(scales.d);
    const float dmin = T::kLow ? half(scales.dmin) : 0;
    if constexpr (T::kGroup == T::kColumns) {
      scale[0] = d;
      if constexpr (T::kLow) low[0] = dmin;
    } else {
      for (int g = 0; g < T::kColumns / T::kGroup; ++g) {
        scale[g] = d * static_cast<float>(scales.sc[g]);
        if constexpr (T::kLow) low[g] = -(dmin * static_cast<float>(scales.m[g]));
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
  static inline void numbers(const uint8_t* bytes, int count, float* out) { memcpy(out, bytes, 4 * count); }
};

struct F16 {
  static constexpr const char* kName = "F16";
  static constexpr int kId = 1, kColumns = 1, kBytes = 2;
  static inline void numbers(const uint8_t* bytes, int count, float* out) {
    int i = 0;
#ifdef __F16C__
    for (; i + 8 <= count; i += 8) put(out + i, _mm256_cvtph_ps((__m128i)word_at<Bytes16>(bytes + 2 * i)));
#endif
    for (; i < count; ++i) out[i] = half_at(bytes + 2 * i);
  }
};

struct Bf16 {
  static constexpr const char* kName = "BF16";
  static constexpr int kId = 30, kColumns = 1, kBytes = 2;
  static inline void numbers(const uint8_t* bytes, int count, float* out) {
    for (int i = 0; i < count; ++i) out[i] = float_of(static_cast<uint32_t>(word_at<uint16_t>(bytes + 2 * i)) << 16);
  }
};

template <class... Types>
struct TypeList {};
using CodeTypes = TypeList<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S,
                           IQ4_NL, IQ3_S, IQ2_S, IQ4_XS, IQ1_M, TQ1_0, TQ2_0, MXFP4, NVFP4>;
using NumberTypes = TypeList<F32, F16, Bf16>;
