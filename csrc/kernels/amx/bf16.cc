// BF16 weights on AMX: TDPBF16PS multiplies a 16 x 32 tile of activations by a 32 x 16 tile of weights.
//
// A panel of 32 rows is two B tiles wide and its 64-byte rows [pair of k][16 rows][2] are what the instruction wants,
// so weights go from memory to tiles untouched. Two A tiles (32 tokens) x two B tiles fill four C tiles. Each output
// element sees the same tile steps of 32 columns in ascending k whatever the number of tokens, so one token costs the
// same instructions with fewer tile rows and gives the same bits. Memory, not the tile unit, decides below ~100 tokens
// per expert: one token moves 2 KiB of weights per step of at most 32 cycles.
#include <immintrin.h>

#include "kernels/kernel_sets.h"

namespace {

#include "kernels/amx/tile_config-inl.h"

constexpr int kPairBytes = 2 * kLineBytes;                  // a pair of k across a panel
constexpr int kStepBytes = kPairBytes * (kt::kPanelK / 2);  // one tile step: 32 columns of k
constexpr int kStepLines = kStepBytes / kLineBytes;
// Few tokens: how far ahead the weights are fetched, two tile steps.
constexpr int kAheadBytes = 2 * kStepBytes;

// From this many blocks of tokens on, each fetches a part of the next panel. Xeon 6, 2 threads, 2026-11-21: shape S
// with 64 tokens per expert (2 blocks) takes 66 ms when the first block streams, 81 ms when the fetching is shared;
// shape L with 512 tokens per expert (8 blocks a call) 345 ms and 308 ms.
constexpr int kSharedFetchBlocks = 4;

struct Block {
  const uint8_t* weights;
  const uint8_t* prefetch;  // lines to bring near while this block computes: `prefetch_lines` of every kStepLines
  int prefetch_lines;
  const uint8_t* a;
  size_t a_bytes;  // row stride
  float* c;
  size_t c_bytes;
  int steps;
  kt::Store store;
};

template <bool kBothHalves>
inline __attribute__((always_inline)) void multiply(const Block& b) {
  const uint8_t* a_low = b.a;
  const uint8_t* a_high = a_low + kTileRows * b.a_bytes;
  uint8_t* c_low = reinterpret_cast<uint8_t*>(b.c);
  uint8_t* c_high = c_low + kTileRows * b.c_bytes;
  if (b.store == kt::Store::kAccumulate) {
    _tile_loadd(0, c_low, b.c_bytes);
    _tile_loadd(1, c_low + kLineBytes, b.c_bytes);
    if (kBothHalves) {
      _tile_loadd(2, c_high, b.c_bytes);
      _tile_loadd(3, c_high + kLineBytes, b.c_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (kBothHalves) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  const uint8_t* w = b.weights;
  const uint8_t* ahead = b.prefetch;
  for (int s = 0; s < b.steps; ++s) {
    _tile_loadd(6, w, kPairBytes);
    _tile_loadd(4, a_low + s * kLineBytes, b.a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + kLineBytes, kPairBytes);
    _tile_dpbf16ps(1, 4, 7);
    if (kBothHalves) {
      _tile_loadd(5, a_high + s * kLineBytes, b.a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    for (int line = 0; line < b.prefetch_lines; ++line) __builtin_prefetch(ahead + line * kLineBytes, 0, 2);
    w += kStepBytes;
    ahead += b.prefetch_lines * kLineBytes;
  }
  _tile_stored(0, c_low, b.c_bytes);
  _tile_stored(1, c_low + kLineBytes, b.c_bytes);
  if (kBothHalves) {
    _tile_stored(2, c_high, b.c_bytes);
    _tile_stored(3, c_high + kLineBytes, b.c_bytes);
  }
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
      if (tokens != configured) {
        const TileConfig config(tokens, kLineBytes);
        _tile_loadconfig(&config);
        configured = tokens;
      }
      // Few blocks of tokens: the first streams the panel from memory, fetching ahead; the others find it in L2. Many:
      // they share out the fetching of the next panel.
      const bool stream = blocks < kSharedFetchBlocks;
      const int lines = !stream ? (kStepLines + blocks - 1) / blocks : i == 0 ? kStepLines : 0;
      const uint8_t* ahead =
          stream ? panel + kAheadBytes : panel + panel_stride + static_cast<size_t>(i) * steps * lines * kLineBytes;
      const Block block = {panel,
                           ahead,
                           lines,
                           g.a.data + first * g.a.stride,
                           g.a.stride,
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
