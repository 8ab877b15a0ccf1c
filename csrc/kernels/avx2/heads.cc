// Heads of queries and keys on AVX2 + FMA.
#include <immintrin.h>

#include "kernels/heads.h"
#include "kernels/kernel_set.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"
using Ops = Avx2;

#include "kernels/elements-inl.h"

#include "kernels/heads-inl.h"
}  // namespace

constexpr kt::HeadKernels kt::kHeadsAvx2 = make_head_kernels<Ops>();
