// 4-bit weights and int8 activations: few tokens by VPDPBUSD, many by AMX, TDPBSSD.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"

#include "kernels/avx512/integer-inl.h"

#include "kernels/avx512/vnni-inl.h"
using Ops = Avx512Vnni;

#include "kernels/scales-inl.h"

#include "kernels/lows-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/integer_codes4-inl.h"

#include "kernels/gemm-inl.h"

#include "kernels/amx/tile_config-inl.h"

#include "kernels/amx/integer-inl.h"

// Nibbles become signed bytes: the table's integers without their offset. A chunk of 8 columns makes two rows of both
// B tiles, one of its low and one of its high nibbles, whose order the activations share.
struct SignedNibbles {
  static constexpr bool kInPlace = false;
  static const uint8_t* weights(const kt::GemmArgs& g, const uint8_t* panel, int begin, int count) {
    const IntegerCodes4::Tables tables(*g.layout);
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(g.layout->integer_offset));
    const __m512i integers = _mm512_sub_epi8(tables.integers, offset);
    IntegerCodes4::Cursor chunk = IntegerCodes4::at(*g.layout, panel, begin);
    uint8_t* out = g.scratch;
    for (int k = 0; k < count; k += IntegerCodes4::kChunkK, chunk = IntegerCodes4::next(chunk)) {
      IntegerCodes4::prefetch(IntegerCodes4::shifted(chunk, Panel<Ops, IntegerCodes4>::kAheadBytes));
      for (int s = 0; s < IntegerCodes4::kSlices; ++s, out += kLineBytes) {
        const __m512i words = Ops::load_bytes(chunk + s * IntegerCodes4::kSliceBytes);
        _mm512_store_si512(out, Ops::look_up(integers, Ops::low_nibbles(words)));
        _mm512_store_si512(out + 2 * kLineBytes, Ops::look_up(integers, Ops::high_nibbles(words)));
      }
      out += 2 * kLineBytes;
    }
    return g.scratch;
  }
};
}  // namespace

constexpr kt::KernelSet kt::kCode4Int8Amx = integer_tile_set<IntegerCodes4, SignedNibbles>("code4_int8.amx");
