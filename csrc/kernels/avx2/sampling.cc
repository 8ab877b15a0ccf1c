// Weights of the next token on AVX2 + FMA.
#include <immintrin.h>

#include "kernels/kernel_set.h"
#include "kernels/sampling.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"
using Ops = Avx2;

#include "kernels/elements-inl.h"

#include "kernels/rows-inl.h"

#include "kernels/sampling-inl.h"
}  // namespace

constexpr kt::SamplingKernels kt::kSamplingAvx2 = make_sampling_kernels<Ops>();
