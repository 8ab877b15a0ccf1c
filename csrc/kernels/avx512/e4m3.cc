// float8_e4m3fn weights on AVX512 (F, BW, VL, DQ): each pair is widened to two fp32 vectors; activations are fp32.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"
using Ops = Avx512;

#include "kernels/scales-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/avx512/e4m3-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kE4m3Avx512 = kernel_set<Ops, CodesE4m3>("e4m3.avx512", &kt::kRowsAvx512);
