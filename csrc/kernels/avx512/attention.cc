// Attention on AVX512.
#include <immintrin.h>

#include "kernels/attention.h"
#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"
using Ops = Avx512;
#include "kernels/avx512/turn-inl.h"
#include "kernels/rows-inl.h"

#include "kernels/attention-inl.h"
}  // namespace

constexpr kt::AttentionKernels kt::kAttentionAvx512 = make_attention_kernels<Ops, Turn>();
