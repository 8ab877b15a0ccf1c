// Shapes of the eight tiles for one block of tokens: two A tiles of 16 tokens, two B tiles of 16 output rows, and the
// four C tiles of their products.

constexpr int kTileRows = 16;
constexpr int kBlockTokens = 2 * kTileRows;
constexpr int kLineBytes = 64;

// Tiles 0..3 = C (token half * 2 + row half), 4..5 = A by token half, 6..7 = B by row half.
struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  // `depth_bytes` of each row of activations are multiplied at once.
  TileConfig(int tokens, int depth_bytes) {
    const int low = tokens < kTileRows ? tokens : kTileRows;
    const int high = tokens - low > 0 ? tokens - low : 1;  // unused tiles still need a valid shape
    for (int t = 0; t < 8; ++t) bytes_per_row[t] = kLineBytes;
    bytes_per_row[4] = bytes_per_row[5] = static_cast<uint16_t>(depth_bytes);
    rows[0] = rows[1] = rows[4] = static_cast<uint8_t>(low);
    rows[2] = rows[3] = rows[5] = static_cast<uint8_t>(high);
    rows[6] = rows[7] = static_cast<uint8_t>(depth_bytes / 4);
  }
};

// Shapes the tiles for `tokens`, unless `configured` is what they are for already; returns what they are for. A call
// that shapes tiles releases them at its end, so that no thread holds tiles while it sleeps or runs something else.
static inline __attribute__((always_inline)) int configure(int configured, int tokens, int depth_bytes) {
  if (tokens != configured) {
    const TileConfig config(tokens, depth_bytes);
    // GCC 12's _tile_loadconfig says that it reads eight bytes: stores to the others need not be done by then.
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  return tokens;
}
