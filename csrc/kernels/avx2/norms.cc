// Normalisation of rows on AVX2 + FMA.
#include <immintrin.h>

#include "kernels/kernel_set.h"
#include "kernels/norms.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"
using Ops = Avx2;

#include "kernels/elements-inl.h"

#include "kernels/norms-inl.h"
}  // namespace

constexpr kt::NormKernels kt::kNormsAvx2 = make_norm_kernels<Ops>();
