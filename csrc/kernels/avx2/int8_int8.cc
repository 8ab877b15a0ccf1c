// Int8 weights and int8 activations on AVX2: VPMADDUBSW of |w| and signed activations, summed in 32 bits.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"

#include "kernels/avx2/integer-inl.h"
using Ops = Avx2LongSums;

#include "kernels/scales-inl.h"

#include "kernels/lows-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/integer_codes8-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kInt8Int8Avx2 = kernel_set<Ops, IntegerCodes8>("int8_int8.avx2", &kt::kRowsAvx2);
