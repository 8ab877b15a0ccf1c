// How the codes of a panel become weights that Ops can multiply: the contract of a Codes type, and where chunks stand.
// Included before the codes, with `Ops` defined.
//
// Decoding comes in two steps, so that few registers wait: decode() for a whole slice, weights() for one result of it.
//
// A chunk holds all 32 rows of kChunkK columns. Codes know where chunks stand: a Cursor points at one, at() finds it,
// next() is the one behind, shifted() the same in another panel, prefetch() asks for its lines. One vector of a chunk,
// a slice, gives kDots x kDotK columns (ascending) for kOutputs vectors of rows: output j of slice s is vector
// s * kOutputs + j of the panel. A group of scales is a whole number of chunks, or, where kSums > 1, so many parts of
// a chunk are one group each. Every decoded value is exact, or exact but for the factor 1 / kSumFactor.

// The chunks of a panel one behind the other.
template <int kColumns, int kBytes>
struct OnePlane {
  static constexpr int kChunkK = kColumns, kChunkBytes = kBytes;
  static constexpr int kSliceBytes = 4 * Ops::kLanes;  // one vector of codes
  static constexpr int kSlices = kChunkBytes / kSliceBytes;
  static constexpr int kSums = 1;
  using Cursor = const uint8_t*;
  static inline __attribute__((always_inline)) Cursor at(const kt::PanelLayout&, const uint8_t* panel, int k) {
    return panel + static_cast<size_t>(k) * kBytes / kColumns;
  }
  static inline __attribute__((always_inline)) Cursor next(Cursor chunk) { return chunk + kBytes; }
  static inline __attribute__((always_inline)) Cursor shifted(Cursor chunk, size_t bytes) { return chunk + bytes; }
  static inline __attribute__((always_inline)) void prefetch(Cursor chunk) {
    for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(chunk + line, 0, 2);
  }
};
