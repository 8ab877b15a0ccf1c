// 4-bit weights with integers of 8 bits and int8 activations on AVX2: VPMADDUBSW.
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

#include "kernels/integer_codes4wide-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kCode4WideInt8Avx2 =
    kernel_set<Ops, IntegerCodes4Wide>("code4wide_int8.avx2", &kt::kRowsAvx2);
