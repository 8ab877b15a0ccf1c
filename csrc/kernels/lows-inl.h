// Scales types of GGUF files (formats/gguf_panel.h), for int8 activations. Included behind scales-inl.h.
//
// Integer sums are of codes less their offset (PanelLayout::integer_offset), so what was subtracted is in the low of a
// group: value = scale * code + low = scale * (code - offset) + (low + offset * scale).

template <class Ops>
struct CodeOffset {
  typename Ops::Vec offset;
  CodeOffset() = default;
  CodeOffset(const kt::PanelLayout& layout, const kt::PanelHeader&)
      : offset(Ops::set(static_cast<float>(layout.integer_offset))) {}
  inline __attribute__((always_inline)) LowStep<Ops> step(typename Ops::Vec scale, typename Ops::Vec low) const {
    return {scale, Ops::fma(offset, scale, low)};
  }
  // Two levels: low = -least * minimum.
  inline __attribute__((always_inline)) LowStep<Ops> step(typename Ops::Vec scale, typename Ops::Vec least,
                                                          typename Ops::Vec minimum) const {
    return step(scale, Ops::sub(Ops::zero(), Ops::mul(least, minimum)));
  }
};

template <class Ops>
struct F16MinScales : StoredAs<Ops, kt::ScaleType::kF16Min> {
  using Step = LowStep<Ops>;
  using Constants = CodeOffset<Ops>;
  static inline __attribute__((always_inline)) Step load(const uint8_t* record, int row, const Constants& constants) {
    const uint16_t* scale = reinterpret_cast<const uint16_t*>(record) + row;
    return constants.step(Ops::from_f16(scale), Ops::from_f16(scale + kt::kPanelRows));
  }
};

// Products of two levels are exact: 11 bits times 8.
template <class Ops>
struct SuperScales : StoredAs<Ops, kt::ScaleType::kSuper> {
  using Records = RecordOfGroups<2 * kt::kPanelRows, kt::kPanelRows>;
  static inline __attribute__((always_inline)) ScaledStep<Ops> load(const typename Records::Place& place, int row,
                                                                    const typename SuperScales::Constants&) {
    return {Ops::mul(Ops::from_f16(reinterpret_cast<const uint16_t*>(place.common) + row),
                     Ops::from_signed_bytes(place.own + row))};
  }
};

template <class Ops>
struct SuperMinScales : StoredAs<Ops, kt::ScaleType::kSuperMin> {
  using Records = RecordOfGroups<4 * kt::kPanelRows, 2 * kt::kPanelRows>;
  using Step = LowStep<Ops>;
  using Constants = CodeOffset<Ops>;
  static inline __attribute__((always_inline)) Step load(const typename Records::Place& place, int row,
                                                         const Constants& constants) {
    const uint16_t* common = reinterpret_cast<const uint16_t*>(place.common) + row;
    return constants.step(Ops::mul(Ops::from_f16(common), Ops::from_bytes(place.own + row)),
                          Ops::from_f16(common + kt::kPanelRows), Ops::from_bytes(place.own + kt::kPanelRows + row));
  }
};

template <class Ops>
struct SuperMin4Scales : StoredAs<Ops, kt::ScaleType::kSuperMin4> {
  using Records = RecordOfGroups<4 * kt::kPanelRows, kt::kPanelRows>;
  using Step = LowStep<Ops>;
  using Constants = CodeOffset<Ops>;
  static inline __attribute__((always_inline)) Step load(const typename Records::Place& place, int row,
                                                         const Constants& constants) {
    const uint16_t* common = reinterpret_cast<const uint16_t*>(place.common) + row;
    return constants.step(Ops::mul(Ops::from_f16(common), Ops::from_low_nibbles(place.own + row)),
                          Ops::from_f16(common + kt::kPanelRows), Ops::from_high_nibbles(place.own + row));
  }
};
