// Attention on AVX2 + FMA.
#include <immintrin.h>

#include "kernels/attention.h"
#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"
using Ops = Avx2;
#include "kernels/avx2/turn-inl.h"
#include "kernels/rows-inl.h"

#include "kernels/attention-inl.h"
}  // namespace

constexpr kt::AttentionKernels kt::kAttentionAvx2 = make_attention_kernels<Ops, Turn>();
