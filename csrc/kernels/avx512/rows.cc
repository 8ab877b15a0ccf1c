// SwiGLU, weighted sums and conversions on AVX512 (F, BW, VL, DQ), 16 fp32 numbers at a time: rows-inl.h.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"
using Ops = Avx512;

#include "kernels/rows-inl.h"
}  // namespace

constexpr kt::RowKernels kt::kRowsAvx512 = make_row_kernels<Ops>();
