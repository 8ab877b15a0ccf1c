// Element-wise work on AVX512 (F, BW, VL, DQ) beside fp32 weights: hidden states are not rounded.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"
using Ops = Avx512;

#include "kernels/rows-inl.h"
}  // namespace

constexpr kt::RowKernels kt::kExactRowsAvx512 = make_row_kernels<Ops, Exact<Ops>>();
