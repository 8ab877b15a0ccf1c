// Normalisation of rows on AVX512 (F, BW, VL, DQ).
#include <immintrin.h>

#include "kernels/kernel_set.h"
#include "kernels/norms.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"
using Ops = Avx512;

#include "kernels/elements-inl.h"

#include "kernels/norms-inl.h"
}  // namespace

constexpr kt::NormKernels kt::kNormsAvx512 = make_norm_kernels<Ops>();
