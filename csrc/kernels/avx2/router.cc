// Choice of experts on AVX2 + FMA.
#include <immintrin.h>

#include "kernels/kernel_set.h"
#include "kernels/router.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"
using Ops = Avx2;

#include "kernels/elements-inl.h"

#include "kernels/rows-inl.h"

#include "kernels/router-inl.h"
}  // namespace

constexpr kt::RouterKernels kt::kRouterAvx2 = make_router_kernels<Ops>();
