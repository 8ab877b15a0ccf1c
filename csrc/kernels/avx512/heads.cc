// Heads of queries and keys on AVX512 (F, BW, VL, DQ).
#include <immintrin.h>

#include "kernels/heads.h"
#include "kernels/kernel_set.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"
using Ops = Avx512;

#include "kernels/elements-inl.h"

#include "kernels/heads-inl.h"
}  // namespace

constexpr kt::HeadKernels kt::kHeadsAvx512 = make_head_kernels<Ops>();
