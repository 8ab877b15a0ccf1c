// Element-wise work on AVX512-BF16: VDPBF16PS multiplies pairs of bf16 and adds them to fp32 (denormals count as zero).
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"

#include "kernels/avx512/dot_bf16-inl.h"
using Ops = Avx512DotBf16;

#include "kernels/rows-inl.h"
}  // namespace

constexpr kt::RowKernels kt::kRowsAvx512Bf16 = make_row_kernels<Ops>();
