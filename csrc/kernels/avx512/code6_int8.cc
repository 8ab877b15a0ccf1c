// 6-bit weights and int8 activations on AVX512 (F, BW, VL, DQ): VPMADDUBSW, summed in 16 bits.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"

#include "kernels/avx512/integer-inl.h"
using Ops = Avx512ShortSums;

#include "kernels/scales-inl.h"

#include "kernels/lows-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/composite-inl.h"

#include "kernels/integer_codes6-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kCode6Int8Avx512 = kernel_set<Ops, IntegerCodes6>("code6_int8.avx512", &kt::kRowsAvx512);
