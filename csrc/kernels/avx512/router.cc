// Choice of experts on AVX512 (F, BW, VL, DQ).
#include <immintrin.h>

#include "kernels/kernel_set.h"
#include "kernels/router.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"
using Ops = Avx512;

#include "kernels/elements-inl.h"

#include "kernels/rows-inl.h"

#include "kernels/router-inl.h"
}  // namespace

constexpr kt::RouterKernels kt::kRouterAvx512 = make_router_kernels<Ops>();
