// The tile registers of AMX and the instructions on them, in plain C++ after the "Operation" sections of Intel's
// Software Developer's Manual, volume 2. Palette 1 only: 8 tiles of 16 rows x 64 bytes.
//
// A function that a real CPU would answer with an exception returns why, in words; nullptr means that it ran.
#pragma once

#include <stdint.h>

namespace trapped_amx {

constexpr int kTiles = 8;
constexpr int kMaxRows = 16;
constexpr int kMaxRowBytes = 64;

// The 64 bytes that LDTILECFG reads.
struct TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "the instruction's layout");

struct Tile {
  alignas(64) uint8_t row[kMaxRows][kMaxRowBytes];
};

// Rows of a tile in memory: row r starts at base + r * stride.
struct Rows {
  uintptr_t base;
  int64_t stride;
};

enum class Product { kBf16, kS8S8, kS8U8, kU8S8, kU8U8 };  // types of the first and the second source

// One thread's registers. All zero is the state after TILERELEASE.
class TileFile {
 public:
  const char* load_config(const TileConfig& config);
  void store_config(TileConfig* config) const;
  void release();
  const char* zero(int tile);
  const char* load(int tile, Rows rows);
  const char* store(int tile, Rows rows);
  // C += A * B, where a 32-bit element of A and B holds 2 bf16 or 4 bytes along the dimension that is summed.
  const char* multiply(Product product, int c, int a, int b);

 private:
  const char* unusable(int tile) const;
  const char* mismatched(int c, int a, int b) const;
  void multiply_bf16(int c, int a, int b);
  template <class A, class B>
  void multiply_bytes(int c, int a, int b);
  void clear_rows_from(int tile, int first);

  TileConfig config_;
  Tile tile_[kTiles];
};

}  // namespace trapped_amx
