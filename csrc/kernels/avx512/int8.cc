// Signed bytes on AVX512 (F, BW, VL, DQ): weights and activations are fp32.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"
using Ops = Avx512;

#include "kernels/scales-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/codes-inl.h"

#include "kernels/gemm-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kInt8Avx512 = kernel_set<Ops, Codes8>("int8.avx512", &kt::kRowsAvx512);
