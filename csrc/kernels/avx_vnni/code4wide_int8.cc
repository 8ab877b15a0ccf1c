// 4-bit weights with integers of 8 bits and int8 activations on AVX-VNNI: VPDPBUSD.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"

#include "kernels/avx2/integer-inl.h"

#include "kernels/avx_vnni/vnni-inl.h"
using Ops = AvxVnni;

#include "kernels/scales-inl.h"

#include "kernels/lows-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/integer_codes4wide-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kCode4WideInt8AvxVnni =
    kernel_set<Ops, IntegerCodes4Wide>("code4wide_int8.avx_vnni", &kt::kRowsAvx2);
