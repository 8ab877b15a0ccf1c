// Element-wise work on AVX2 + FMA beside fp32 weights: hidden states are not rounded.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"
using Ops = Avx2;

#include "kernels/rows-inl.h"
}  // namespace

constexpr kt::RowKernels kt::kExactRowsAvx2 = make_row_kernels<Ops, Exact<Ops>>();
