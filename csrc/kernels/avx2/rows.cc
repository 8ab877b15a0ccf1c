// Element-wise work on AVX2 + FMA: each pair is widened to two fp32 vectors; activations are fp32.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"
using Ops = Avx2;

#include "kernels/rows-inl.h"
}  // namespace

constexpr kt::RowKernels kt::kRowsAvx2 = make_row_kernels<Ops>();
