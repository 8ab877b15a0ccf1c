// BF16 weights on AMX: TDPBF16PS multiplies a 16 x 32 tile of activations by a 32 x 16 tile of weights.
//
// A panel of 32 rows is two B tiles wide and its 64-byte rows [pair of k][16 rows][2] are what the instruction wants,
// so weights go from memory to tiles untouched. Each output element sees the same tile steps of 32 columns in ascending
// k whatever the number of tokens, so one token costs the same instructions with fewer tile rows and gives the same
// bits. Memory, not the tile unit, decides below ~100 tokens per expert: one token moves 2 KiB of weights per step of
// at most 32 cycles.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {

#include "kernels/amx/tile_config-inl.h"

#include "kernels/amx/tile_loop-inl.h"

// From this many blocks of tokens on, each fetches a part of the next panel. Xeon 6, 2 threads, 2026-11-21: shape S
// with 64 tokens per expert (2 blocks) takes 66 ms when the first block streams, 81 ms when the fetching is shared;
// shape L with 512 tokens per expert (8 blocks a call) 345 ms and 308 ms.
constexpr int kSharedFetchBlocks = 4;

struct Block {
  Operands operands;
  Ahead ahead;
  float* c;
  size_t c_bytes;
  int steps;
  kt::Store store;
};

template <bool kBothHalves>
void multiply(const Block& b) {
  using Tiles = TileBlock<Bf16Products, kBothHalves>;
  if (b.store == kt::Store::kAccumulate) {
    Tiles::load(b.c, b.c_bytes);
  } else {
    Tiles::zero();
  }
  Tiles::multiply(b.operands, b.steps * kLineBytes, kLineBytes, b.ahead);
  Tiles::store(b.c, b.c_bytes);
}

// Few blocks of tokens: the first streams the panel from memory, fetching ahead, and A is near for the next panel.
// Many: they share out the fetching of the next panel, and A comes from L2.
Ahead ahead_of(const Operands& operands, size_t panel_stride, int blocks, int block, int steps, int tokens) {
  if (blocks < kSharedFetchBlocks) return {operands.b + kAheadBytes, block == 0 ? kStepLines : 0, 0, 0, nullptr};
  const int lines = (kStepLines + blocks - 1) / blocks;
  const size_t share = static_cast<size_t>(steps) * lines * kLineBytes;
  const uint8_t* next_rows = operands.a + kBlockTokens * operands.a_stride;
  return {operands.b + panel_stride + block * share, lines, tokens, steps * kLineBytes, next_rows};
}

void gemm(const kt::GemmArgs& g) {
  const int blocks = (g.tokens + kBlockTokens - 1) / kBlockTokens;
  const int steps = g.k_count / kt::kPanelK;
  const size_t panel_stride = g.layout->panel_bytes;
  const size_t first_byte = static_cast<size_t>(g.first_k / kt::kPanelK) * kStepBytes;
  int configured = 0;
  for (int p = 0; p < g.panel_count; ++p) {
    const uint8_t* panel = g.panels + p * panel_stride + first_byte;
    for (int i = 0; i < blocks; ++i) {
      const int first = i * kBlockTokens;
      const int tokens = g.tokens - first < kBlockTokens ? g.tokens - first : kBlockTokens;
      configured = configure(configured, tokens, kLineBytes);
      const Operands operands = {g.a.data + first * g.a.stride, g.a.stride, panel};
      const Block block = {operands,
                           ahead_of(operands, panel_stride, blocks, i, steps, tokens),
                           g.c + first * g.c_stride + p * kt::kPanelRows,
                           g.c_stride * sizeof(float),
                           steps,
                           g.store};
      if (tokens > kTileRows) {
        multiply<true>(block);
      } else {
        multiply<false>(block);
      }
    }
  }
  _tile_release();
}

size_t no_scratch(int, int) { return 0; }

}  // namespace

// One way for any number of tokens.
constexpr kt::KernelSet kt::kBf16Amx = {"bf16.amx", kt::Activation::kBf16, 0, gemm, gemm, kt::kBlocking, no_scratch,
                                        nullptr,    &kt::kRowsAvx512Bf16};
