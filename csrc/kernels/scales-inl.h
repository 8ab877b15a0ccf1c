// How the scales beside the codes are read and what a step adds to a total: one type for each way of storing them,
// chosen once per call. Included before the codes, which list the types they may meet.
//
// A Scales type provides, for the Ops it is made for:
//   kType                             what PanelLayout::scale_type calls it
//   constants(PanelHeader)            of one panel: Constants
//   load(record, row, constants)      what kLanes rows from `row` on need at a step: Step
// A Step is kept as fp32 by ManyTokens; add(total, sum, group) is the total after a step. (A type whose steps also have
// a minimum adds it there times group->sums.)

// scale * sum of the step, by one fused multiply-add.
template <class Ops>
struct ScaledStep {
  using Vec = typename Ops::Vec;
  Vec scale;

  // A record of fp32 for 32 rows, as ManyTokens keeps it.
  static inline __attribute__((always_inline)) ScaledStep from_memory(const float* record, int row) {
    return {Ops::load(record + row)};
  }
  inline __attribute__((always_inline)) void to_memory(float* record, int row) const {
    Ops::store(record + row, scale);
  }
  // Of one token: with int8 activations its step has a scale of its own.
  inline __attribute__((always_inline)) Vec add(Vec total, Vec sum, const kt::RowGroup* group) const {
    if constexpr (Ops::kInteger) {
      return Ops::fma(sum, Ops::mul(scale, Ops::set(group->scale)), total);
    } else {
      return Ops::fma(sum, scale, total);
    }
  }
};

// What most types have in common.
template <kt::ScaleType type>
struct StoredAs {
  static constexpr kt::ScaleType kType = type;
  static constexpr bool kScaled = type != kt::ScaleType::kNone;
  struct Constants {};
  static inline Constants constants(const kt::PanelHeader&) { return {}; }
};

// Formats without scales: the sum of all columns is the total.
template <class Ops>
struct NoScales : StoredAs<kt::ScaleType::kNone> {};

template <class Ops>
struct ScalarScales : StoredAs<kt::ScaleType::kScalar> {
  static inline __attribute__((always_inline)) ScaledStep<Ops> load(const uint8_t* record, int,
                                                                    const StoredAs::Constants&) {
    float scale;
    __builtin_memcpy(&scale, record, sizeof(scale));
    return {Ops::set(scale)};
  }
};

template <class Ops>
struct F32Scales : StoredAs<kt::ScaleType::kF32> {
  static inline __attribute__((always_inline)) ScaledStep<Ops> load(const uint8_t* record, int row,
                                                                    const StoredAs::Constants&) {
    return {Ops::load(reinterpret_cast<const float*>(record) + row)};
  }
};

template <class Ops>
struct Bf16Scales : StoredAs<kt::ScaleType::kBf16> {
  static inline __attribute__((always_inline)) ScaledStep<Ops> load(const uint8_t* record, int row,
                                                                    const StoredAs::Constants&) {
    return {Ops::from_bf16(reinterpret_cast<const uint16_t*>(record) + row)};
  }
};

template <class Ops>
struct F16Scales : StoredAs<kt::ScaleType::kF16> {
  static inline __attribute__((always_inline)) ScaledStep<Ops> load(const uint8_t* record, int row,
                                                                    const StoredAs::Constants&) {
    return {Ops::from_f16(reinterpret_cast<const uint16_t*>(record) + row)};
  }
};

template <class Ops>
struct E8m0Scales : StoredAs<kt::ScaleType::kE8m0> {
  static inline __attribute__((always_inline)) ScaledStep<Ops> load(const uint8_t* record, int row,
                                                                    const StoredAs::Constants&) {
    return {Ops::from_e8m0(record + row)};
  }
};

template <class Ops>
struct E4m3Scales : StoredAs<kt::ScaleType::kE4m3> {
  struct Constants {
    typename Ops::Vec factor;
  };
  // from_e4m3 gives 2^-8 of the value.
  static inline Constants constants(const kt::PanelHeader& header) { return {Ops::set(header.factor * 256)}; }
  static inline __attribute__((always_inline)) ScaledStep<Ops> load(const uint8_t* record, int row,
                                                                    const Constants& constants) {
    return {Ops::mul(Ops::from_e4m3(record + row), constants.factor)};
  }
};

// Calls f(Scales<Ops>()) for the type of the list that a layout names.
template <template <class> class... Scales>
struct ScaleList {
  template <class Ops, class F>
  static inline __attribute__((always_inline)) void call(kt::ScaleType type, F f) {
    const bool found = ((Scales<Ops>::kType == type && (f(Scales<Ops>()), true)) || ...);
    if (!found) __builtin_unreachable();
  }
};
