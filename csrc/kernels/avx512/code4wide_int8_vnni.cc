// 4-bit weights with integers of 8 bits and int8 activations on AVX512-VNNI: VPDPBUSD.
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

#include "kernels/integer_codes4wide-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kCode4WideInt8Avx512Vnni =
    kernel_set<Ops, IntegerCodes4Wide>("code4wide_int8.avx512_vnni", &kt::kRowsAvx512);
