// The gated delta rule and what belongs to it on AVX2 + FMA.
#include <immintrin.h>

#include "kernels/gated_delta.h"
#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"
using Ops = Avx2;

#include "kernels/rows-inl.h"

#include "kernels/gated_delta-inl.h"
}  // namespace

constexpr kt::GatedDeltaKernels kt::kGatedDeltaAvx2 = make_gated_delta_kernels<Ops>();
