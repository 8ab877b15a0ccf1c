// 4-bit weights on AVX2 + FMA: each pair is widened to two fp32 vectors; activations are fp32.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"
using Ops = Avx2;

#include "kernels/scales-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/codes-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kCode4Avx2 = kernel_set<Ops, Codes4>("code4.avx2", &kt::kRowsAvx2);
