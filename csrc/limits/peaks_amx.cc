#include <immintrin.h>

#include "limits/peaks.h"

namespace {

struct alignas(64) Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
  Config() {
    for (int t = 0; t < 8; ++t) {
      bytes_per_row[t] = 64;
      rows[t] = 16;
    }
  }
};

// Four accumulator tiles hide the latency, as in the kernels; `kStep` is one of the tile multiplications.
#define KT_FOUR_STEPS(step) \
  step(0, 4, 6);            \
  step(1, 4, 7);            \
  step(2, 5, 6);            \
  step(3, 5, 7)

float finish() {
  float out[16 * 16];
  _tile_stored(0, out, 64);
  _tile_release();
  return out[0];
}

void begin() {
  static const uint8_t zeros[16 * 64] = {};
  const Config config;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
}

float bf16(uint64_t rounds) {
  begin();
  for (uint64_t r = 0; r < rounds; ++r) {
    KT_FOUR_STEPS(_tile_dpbf16ps);
  }
  return finish();
}

float int8(uint64_t rounds) {
  begin();
  for (uint64_t r = 0; r < rounds; ++r) {
    KT_FOUR_STEPS(_tile_dpbssd);
  }
  return finish();
}

}  // namespace

constexpr kt::Peak kt::kPeakBf16Amx = {"bf16 tiles, amx", 4 * 16 * 16 * 32 * 2, bf16};
constexpr kt::Peak kt::kPeakInt8Amx = {"int8 tiles, amx", 4 * 16 * 16 * 64 * 2, int8};
