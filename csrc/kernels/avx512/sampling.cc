// Weights of the next token on AVX512 (F, BW, VL, DQ).
#include <immintrin.h>

#include "kernels/kernel_set.h"
#include "kernels/sampling.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"
using Ops = Avx512;

#include "kernels/elements-inl.h"

#include "kernels/rows-inl.h"

#include "kernels/sampling-inl.h"
}  // namespace

constexpr kt::SamplingKernels kt::kSamplingAvx512 = make_sampling_kernels<Ops>();
