// float8_e4m3fn weights on AVX512-BF16 with VBMI where FMA beats VDPBF16PS: the same bits as e4m3_dot.cc.
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

#include "kernels/avx512/fma_for_dot-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kE4m3Avx512Bf16Fma = fma_for_dot<CodesE4m3, CodesE4m3>("e4m3.avx512_bf16_fma");
