// 3-bit weights and int8 activations: few tokens by VPDPBUSD, many by AMX, TDPBSSD.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"

#include "kernels/avx512/integer-inl.h"

#include "kernels/avx512/vnni-inl.h"
using Ops = Avx512Vnni;

#include "kernels/scales-inl.h"

#include "kernels/lows-inl.h"

#include "kernels/planes-inl.h"

#include "kernels/composite-inl.h"

#include "kernels/integer_codes3-inl.h"

#include "kernels/gemm-inl.h"

#include "kernels/amx/tile_config-inl.h"

#include "kernels/amx/tile_loop-inl.h"

#include "kernels/amx/tiles-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kCode3Int8Amx = integer_tile_set<IntegerCodes3>("code3_int8.amx");
