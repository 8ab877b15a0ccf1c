// The rows of kernels that multiply with AVX512-BF16: as rows.cc, with its conversion to bf16 (denormals become zero).
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
