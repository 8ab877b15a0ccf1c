// 6-bit weights and int8 activations on AVX2: VPMADDUBSW, summed in 16 bits.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"

#include "kernels/avx2/integer-inl.h"
using Ops = Avx2ShortSums;

#include "kernels/scales-inl.h"

#include "kernels/lows-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/composite-inl.h"

#include "kernels/integer_codes6-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kCode6Int8Avx2 = kernel_set<Ops, IntegerCodes6>("code6_int8.avx2", &kt::kRowsAvx2);
