// fp32 weights and activations, neither of them rounded, on AVX512 (F, BW, VL, DQ).
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"
using Ops = Avx512;

#include "kernels/scales-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/codes_f32-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kF32Avx512 = kernel_set<Ops, CodesF32>("f32.avx512", &kt::kExactRowsAvx512);
