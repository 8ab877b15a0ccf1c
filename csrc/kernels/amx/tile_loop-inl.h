// The tile instructions of one block: up to 32 tokens x the 32 rows of a panel, four products for four tile loads.
// Included behind tile_config-inl.h; every AMX kernel runs this loop.
//
//   A (tiles 4, 5)   activations, a row for each token, `depth` bytes of it at once
//   B (tiles 6, 7)   weights: a line of 64 bytes holds 4 bytes' columns of 16 output rows, two side by side are a panel
//   C (tiles 0..3)   sums, fp32 or int32
//
// What is loaded from L2 sets the pace (Xeon 6, 2026-11-21: a bare loop of these instructions reaches 55 % of the bf16
// peak when A and B come from L2, 72 % from L1). B is small enough to stay in L1 while tokens pass by, so A is fetched
// there two steps ahead.

constexpr int kPanelLine = 2 * kLineBytes;                 // a line of both B tiles
constexpr int kStepBytes = kPanelLine * (kLineBytes / 4);  // B tiles for 64 bytes of each row of A
constexpr int kStepLines = kStepBytes / kLineBytes;
constexpr int kRowAhead = 2 * kLineBytes;    // A
constexpr int kAheadBytes = 2 * kStepBytes;  // B, where it streams from memory

// GCC's intrinsics spell the numbers of tiles into assembler text, so that they cannot be template parameters.
struct Bf16Products {
  static constexpr int kColumnBytes = 2;
  static inline __attribute__((always_inline)) void low_low() { _tile_dpbf16ps(0, 4, 6); }
  static inline __attribute__((always_inline)) void low_high() { _tile_dpbf16ps(1, 4, 7); }
  static inline __attribute__((always_inline)) void high_low() { _tile_dpbf16ps(2, 5, 6); }
  static inline __attribute__((always_inline)) void high_high() { _tile_dpbf16ps(3, 5, 7); }
};

struct Int8Products {
  static constexpr int kColumnBytes = 1;
  static inline __attribute__((always_inline)) void low_low() { _tile_dpbssd(0, 4, 6); }
  static inline __attribute__((always_inline)) void low_high() { _tile_dpbssd(1, 4, 7); }
  static inline __attribute__((always_inline)) void high_low() { _tile_dpbssd(2, 5, 6); }
  static inline __attribute__((always_inline)) void high_high() { _tile_dpbssd(3, 5, 7); }
};

// Rows of A, and the weights that belong to them.
struct Operands {
  const uint8_t* a;
  size_t a_stride;
  const uint8_t* b;
};

// What to bring near while a block computes. For each line of A's rows: `lines` lines from `weights` on, and a line of
// A itself, of the next rows when these end.
struct Ahead {
  const uint8_t* weights;
  int lines;
  int rows;       // 0: A is near
  int row_bytes;  // from Operands::a to where these rows end
  const uint8_t* next_rows;
};

// GCC 12 says of tile loads no more than which registers they read: stores before them must be done.
static inline __attribute__((always_inline)) void settle_stores() { __asm__ volatile("" : : : "memory"); }

// kBothHalves: more than 16 tokens.
template <class Products, bool kBothHalves>
struct TileBlock {
  static inline __attribute__((always_inline)) void zero() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kBothHalves) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }

  // Sums in memory: the rows of a token `stride` bytes behind those of the one before.
  static inline __attribute__((always_inline)) void load(const void* sums, size_t stride) {
    const uint8_t* low = static_cast<const uint8_t*>(sums);
    _tile_loadd(0, low, stride);
    _tile_loadd(1, low + kLineBytes, stride);
    if constexpr (kBothHalves) {
      const uint8_t* high = low + kTileRows * stride;
      _tile_loadd(2, high, stride);
      _tile_loadd(3, high + kLineBytes, stride);
    }
  }
  static inline __attribute__((always_inline)) void store(void* sums, size_t stride) {
    uint8_t* low = static_cast<uint8_t*>(sums);
    _tile_stored(0, low, stride);
    _tile_stored(1, low + kLineBytes, stride);
    if constexpr (kBothHalves) {
      uint8_t* high = low + kTileRows * stride;
      _tile_stored(2, high, stride);
      _tile_stored(3, high + kLineBytes, stride);
    }
  }

  // Adds the products of `bytes` of each row of A, `depth` at once, as the tiles are configured.
  static inline __attribute__((always_inline)) void multiply(const Operands& o, int bytes, int depth, Ahead ahead) {
    const uint8_t* w = o.b;
    for (int k = 0; k < bytes; k += depth, w += kPanelLine / 4 * depth) {
      const uint8_t* a = o.a + k;
      _tile_loadd(6, w, kPanelLine);
      _tile_loadd(4, a, o.a_stride);
      Products::low_low();
      _tile_loadd(7, w + kLineBytes, kPanelLine);
      Products::low_high();
      if constexpr (kBothHalves) {
        _tile_loadd(5, a + kTileRows * o.a_stride, o.a_stride);
        Products::high_low();
        Products::high_high();
      }
      if (k % kLineBytes != 0) continue;
      if (ahead.rows > 0) {
        const int beyond = k + kRowAhead - ahead.row_bytes;
        const uint8_t* far = beyond < 0 ? a + kRowAhead : ahead.next_rows + beyond;
        for (int r = 0; r < ahead.rows; ++r, far += o.a_stride) __builtin_prefetch(far, 0, 3);
      }
      for (int l = 0; l < ahead.lines; ++l) __builtin_prefetch(ahead.weights + l * kLineBytes, 0, 2);
      ahead.weights += ahead.lines * kLineBytes;
    }
  }
};
