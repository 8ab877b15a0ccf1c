// 5-bit weights and int8 activations on AVX512-VNNI: VPDPBUSD.
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

#include "kernels/composite-inl.h"

#include "kernels/integer_codes5-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kCode5Int8Avx512Vnni =
    kernel_set<Ops, IntegerCodes5>("code5_int8.avx512_vnni", &kt::kRowsAvx512);
