// float8_e4m3fn weights on AVX512-BF16 with VBMI: VDPBF16PS multiplies pairs of bf16 and adds them to fp32 (denormals
// count as zero).
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"

#include "kernels/avx512/dot_bf16-inl.h"
using Ops = Avx512DotBf16;

#include "kernels/scales-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/avx512/e4m3_vbmi-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kE4m3Avx512Bf16 = kernel_set<Ops, CodesE4m3>("e4m3.avx512_bf16", &kt::kRowsAvx512Bf16);
