// Int8 weights and bf16 activations on AMX: decoded to bf16 tiles, which TDPBF16PS multiplies.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"

#include "kernels/avx512/dot_bf16-inl.h"
using Ops = Avx512DotBf16;

#include "kernels/scales-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/codes-inl.h"

#include "kernels/gemm-inl.h"

#include "kernels/amx/tile_config-inl.h"

#include "kernels/amx/tile_loop-inl.h"

#include "kernels/amx/tiles-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kInt8Amx = bf16_tile_set<Codes8>("int8.amx");
