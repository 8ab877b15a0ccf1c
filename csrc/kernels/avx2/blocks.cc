// Blocks of GGUF files on AVX2: decoded to fp32, activations in fp32.
#include <immintrin.h>
#include <string.h>

#include "formats/gguf/blocks.h"
#include "formats/gguf/grids.h"
#include "kernels/kernel_sets.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"
using Ops = Avx2;

#include "kernels/scales-inl.h"

#include "kernels/gemm-inl.h"

#include "formats/gguf/block_types-inl.h"

#include "kernels/avx2/quads-inl.h"

#include "kernels/blocks-inl.h"
}  // namespace

constexpr kt::KernelSet kt::kBlocksAvx2 = blocks_kernel_set<Ops>("blocks.avx2", &kt::kRowsAvx2);
