// Gated activations on AVX2 + FMA.
#include <immintrin.h>

#include "kernels/gates.h"
#include "kernels/kernel_set.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"
using Ops = Avx2;

#include "kernels/elements-inl.h"

#include "kernels/rows-inl.h"

#include "kernels/gates-inl.h"
}  // namespace

constexpr kt::GateKernels kt::kGatesAvx2 = make_gate_kernels<Ops>();
