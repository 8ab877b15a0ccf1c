// Gated activations on AVX512 (F, BW, VL, DQ).
#include <immintrin.h>

#include "kernels/gates.h"
#include "kernels/kernel_set.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"
using Ops = Avx512;

#include "kernels/elements-inl.h"

#include "kernels/rows-inl.h"

#include "kernels/gates-inl.h"
}  // namespace

constexpr kt::GateKernels kt::kGatesAvx512 = make_gate_kernels<Ops>();
