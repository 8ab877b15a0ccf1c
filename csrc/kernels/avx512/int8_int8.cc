// Int8 weights and int8 activations on AVX512 (F, BW, VL, DQ): VPMADDUBSW of |w|, summed in 32 bits.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"

#include "kernels/avx512/integer-inl.h"
using Ops = Avx512LongSums;

#include "kernels/scales-inl.h"

#include "kernels/lows-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/integer_codes8-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kInt8Int8Avx512 = kernel_set<Ops, IntegerCodes8>("int8_int8.avx512", &kt::kRowsAvx512);
