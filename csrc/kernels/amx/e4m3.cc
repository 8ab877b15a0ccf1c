// float8_e4m3fn weights and bf16 activations on AMX: decoded to bf16 tiles, which TDPBF16PS multiplies.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"

#include "kernels/avx512/dot_bf16-inl.h"
using Ops = Avx512DotBf16;

#include "kernels/scales-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/avx512/e4m3_vbmi-inl.h"

#include "kernels/gemm-inl.h"

#include "kernels/amx/tile_config-inl.h"

#include "kernels/amx/tile_loop-inl.h"

#include "kernels/amx/tiles-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kE4m3Amx = bf16_tile_set<CodesE4m3>("e4m3.amx");
