#include "tiles.h"

#include <math.h>
#include <string.h>
#include <xmmintrin.h>

namespace trapped_amx {
namespace {

// Denormals read as zero (bit 6) and flushed to zero (bit 15), round to nearest even, no exceptions: what TDPBF16PS
// does whatever MXCSR holds.
constexpr unsigned kMxcsrOfTiles = 0x9FC0;

constexpr int kLanes = kMaxRowBytes / 4;

float wide(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// One row of C. The manual keeps the sums of the first and of the second of each pair apart, both from zero, and adds
// them to each other and then to C. (The intrinsics guide describes another order: one sum that starts with C.)
// Not inlined: the caller sets MXCSR around it. Lanes beyond C's row are zero in B, and stay so in C.
__attribute__((noinline)) void multiply_row_bf16(float (&c)[kLanes], const uint8_t* a, const Tile& b, int pairs) {
  float first[kLanes] = {}, second[kLanes] = {};
  for (int k = 0; k < pairs; ++k) {
    uint16_t x[2], y[2 * kLanes];
    memcpy(x, a + 4 * k, sizeof(x));
    memcpy(y, b.row[k], sizeof(y));
    for (int n = 0; n < kLanes; ++n) {
      first[n] = fmaf(wide(x[0]), wide(y[2 * n]), first[n]);
      second[n] = fmaf(wide(x[1]), wide(y[2 * n + 1]), second[n]);
    }
  }
  for (int n = 0; n < kLanes; ++n) c[n] += first[n] + second[n];
}

}  // namespace

const char* TileFile::load_config(const TileConfig& config) {
  if (config.palette == 0) {
    release();
    return nullptr;
  }
  if (config.palette != 1) return "the palette is neither 0 nor 1";
  for (uint8_t byte : config.reserved) {
    if (byte != 0) return "a reserved byte of the configuration is not zero";
  }
  for (int t = 0; t < 16; ++t) {
    const int rows = config.rows[t], row_bytes = config.row_bytes[t];
    if (t >= kTiles && (rows != 0 || row_bytes != 0)) return "a tile beyond the eighth has a shape";
    if (rows > kMaxRows || row_bytes > kMaxRowBytes) return "a tile has more than 16 rows of 64 bytes";
    if ((rows == 0) != (row_bytes == 0)) return "a tile has rows without bytes or bytes without rows";
  }
  config_ = config;
  memset(tile_, 0, sizeof(tile_));
  return nullptr;
}

void TileFile::store_config(TileConfig* config) const { *config = config_; }

void TileFile::release() {
  memset(&config_, 0, sizeof(config_));
  memset(tile_, 0, sizeof(tile_));
}

const char* TileFile::unusable(int tile) const {
  if (config_.palette == 0) return "no tiles are configured";
  if (config_.rows[tile] == 0) return "the tile has no shape";
  return nullptr;
}

void TileFile::clear_rows_from(int tile, int first) {
  memset(tile_[tile].row[first], 0, static_cast<size_t>(kMaxRows - first) * kMaxRowBytes);
}

const char* TileFile::zero(int tile) {
  if (const char* why = unusable(tile)) return why;
  clear_rows_from(tile, 0);
  config_.start_row = 0;
  return nullptr;
}

const char* TileFile::load(int tile, Rows rows) {
  if (const char* why = unusable(tile)) return why;
  const int count = config_.rows[tile], bytes = config_.row_bytes[tile];
  for (int r = config_.start_row; r < count; ++r) {
    uint8_t* row = tile_[tile].row[r];
    memcpy(row, reinterpret_cast<const void*>(rows.base + r * rows.stride), bytes);
    memset(row + bytes, 0, kMaxRowBytes - bytes);
  }
  clear_rows_from(tile, count);
  config_.start_row = 0;
  return nullptr;
}

const char* TileFile::store(int tile, Rows rows) {
  if (const char* why = unusable(tile)) return why;
  for (int r = config_.start_row; r < config_.rows[tile]; ++r) {
    memcpy(reinterpret_cast<void*>(rows.base + r * rows.stride), tile_[tile].row[r], config_.row_bytes[tile]);
  }
  config_.start_row = 0;
  return nullptr;
}

const char* TileFile::mismatched(int c, int a, int b) const {
  const int named[] = {c, a, b};
  for (int tile : named) {
    if (const char* why = unusable(tile)) return why;
    if (config_.row_bytes[tile] % 4 != 0) return "a row is not a multiple of 4 bytes";
  }
  if (c == a || c == b || a == b) return "a tile is named twice";
  if (config_.start_row != 0) return "the start row is not zero";
  if (config_.rows[c] != config_.rows[a]) return "destination and first source differ in rows";
  if (config_.row_bytes[c] != config_.row_bytes[b]) return "destination and second source differ in bytes of a row";
  if (config_.row_bytes[a] != 4 * config_.rows[b]) return "the first source's columns are not the second's rows";
  return nullptr;
}

void TileFile::multiply_bf16(int c, int a, int b) {
  const unsigned mxcsr = _mm_getcsr();
  _mm_setcsr(kMxcsrOfTiles);
  for (int m = 0; m < config_.rows[c]; ++m) {
    float sums[kLanes];
    memcpy(sums, tile_[c].row[m], sizeof(sums));
    multiply_row_bf16(sums, tile_[a].row[m], tile_[b], config_.row_bytes[a] / 4);
    memcpy(tile_[c].row[m], sums, config_.row_bytes[c]);
  }
  _mm_setcsr(mxcsr);
}

template <class A, class B>
void TileFile::multiply_bytes(int c, int a, int b) {
  for (int m = 0; m < config_.rows[c]; ++m) {
    uint32_t sums[kLanes];
    memcpy(sums, tile_[c].row[m], sizeof(sums));
    for (int k = 0; k < config_.row_bytes[a] / 4; ++k) {
      A x[4];
      B y[4 * kLanes];
      memcpy(x, tile_[a].row[m] + 4 * k, sizeof(x));
      memcpy(y, tile_[b].row[k], sizeof(y));
      for (int n = 0; n < kLanes; ++n) {
        int32_t dot = 0;
        for (int i = 0; i < 4; ++i) dot += static_cast<int32_t>(x[i]) * y[4 * n + i];
        sums[n] += static_cast<uint32_t>(dot);  // modulo 2^32
      }
    }
    memcpy(tile_[c].row[m], sums, config_.row_bytes[c]);
  }
}

const char* TileFile::multiply(Product product, int c, int a, int b) {
  if (const char* why = mismatched(c, a, b)) return why;
  switch (product) {
    case Product::kBf16:
      multiply_bf16(c, a, b);
      break;
    case Product::kS8S8:
      multiply_bytes<int8_t, int8_t>(c, a, b);
      break;
    case Product::kS8U8:
      multiply_bytes<int8_t, uint8_t>(c, a, b);
      break;
    case Product::kU8S8:
      multiply_bytes<uint8_t, int8_t>(c, a, b);
      break;
    case Product::kU8U8:
      multiply_bytes<uint8_t, uint8_t>(c, a, b);
      break;
  }
  return nullptr;
}

}  // namespace trapped_amx
