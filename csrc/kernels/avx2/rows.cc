// SwiGLU, weighted sums and conversions on AVX2 + FMA, 8 fp32 numbers at a time: rows-inl.h.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"
using Ops = Avx2;

#include "kernels/rows-inl.h"
}  // namespace

constexpr kt::RowKernels kt::kRowsAvx2 = make_row_kernels<Ops>();
