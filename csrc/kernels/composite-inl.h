// Where the words of composite chunks stand (formats/codes/code5.h and the like). Included behind planes-inl.h, before
// the codes, with an integer `Ops` defined.

// Chunks of several 32-bit words for each row, kt::kPanelRows words from one of a row to the next.
template <int kColumns, int kWords>
struct Composite : OnePlane<kColumns, kWords * 4 * kt::kPanelRows> {
  using Plane = OnePlane<kColumns, kWords * 4 * kt::kPanelRows>;
  using typename Plane::Cursor;
  static constexpr int kWordBytes = 4 * kt::kPanelRows;
  static constexpr int kSlices = kWordBytes / Plane::kSliceBytes;
  static inline __attribute__((always_inline)) typename Ops::Bytes word(Cursor chunk, int i, int slice) {
    return Ops::load_bytes(chunk + i * kWordBytes + slice * Plane::kSliceBytes);
  }
};
