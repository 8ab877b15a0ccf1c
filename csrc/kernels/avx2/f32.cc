// fp32 weights and activations, neither of them rounded, on AVX2 + FMA.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"
using Ops = Avx2;

#include "kernels/scales-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/codes_f32-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kF32Avx2 = kernel_set<Ops, CodesF32>("f32.avx2", &kt::kExactRowsAvx2);
