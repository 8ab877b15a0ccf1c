// bf16 weights on AVX512-BF16: VDPBF16PS multiplies pairs of bf16 and adds them to fp32 (denormals count as zero).
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"

#include "kernels/avx512/dot_bf16-inl.h"
using Ops = Avx512DotBf16;

#include "kernels/scales-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/codes-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kBf16Avx512Bf16 = kernel_set<Ops, CodesBf16>("bf16.avx512_bf16", &kt::kRowsAvx512Bf16);
