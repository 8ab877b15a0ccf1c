// 4-bit weights on AVX512-BF16 where FMA beats VDPBF16PS: the same bits as code4_dot.cc.
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

#include "kernels/avx512/code4_wide-inl.h"

#include "kernels/gemm-inl.h"

#include "kernels/avx512/fma_for_dot-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kCode4Avx512Bf16Fma = fma_for_dot<Codes4, Codes4Wide>("code4.avx512_bf16_fma");
