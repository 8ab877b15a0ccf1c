// How the scales beside the codes are read and what a sum of products adds to a total: one type for each way of storing
// them, chosen once per call. Included before the codes, which list the types they may meet.
//
// A Scales type provides, for the Ops it is made for:
//   kType                             what PanelLayout::scale_type calls it
//   Records(layout)                   where records stand: at(panel, group) is a Place, prefetch(Place) asks for it
//   Constants(layout, PanelHeader)    of one panel
//   Step                              what kLanes rows need at the sum of a group: ScaledStep or LowStep
//   load(place, row, constants)       the Step of kLanes rows from `row` on

// scale * sum, by one fused multiply-add.
template <class Ops>
struct ScaledStep {
  using Vec = typename Ops::Vec;
  static constexpr int kFloats = kt::kPanelRows;  // of a record for 32 rows, as ManyTokens keeps it
  Vec scale;

  static inline __attribute__((always_inline)) ScaledStep from_memory(const float* record, int row) {
    return {Ops::load(record + row)};
  }
  inline __attribute__((always_inline)) void to_memory(float* record, int row) const {
    Ops::store(record + row, scale);
  }
  inline __attribute__((always_inline)) Vec add(Vec total, Vec sum, const kt::RowGroup*) const {
    return Ops::fma(sum, scale, total);
  }
};

// A group's numbers have low * (sum of the group's activations) in common besides.
template <class Ops>
struct LowStep {
  using Vec = typename Ops::Vec;
  static constexpr int kFloats = 2 * kt::kPanelRows;
  Vec scale, low;

  static inline __attribute__((always_inline)) LowStep from_memory(const float* record, int row) {
    return {Ops::load(record + row), Ops::load(record + kt::kPanelRows + row)};
  }
  inline __attribute__((always_inline)) void to_memory(float* record, int row) const {
    Ops::store(record + row, scale);
    Ops::store(record + kt::kPanelRows + row, low);
  }
  inline __attribute__((always_inline)) Vec add(Vec total, Vec sum, const kt::RowGroup* group) const {
    return Ops::fma(low, Ops::set(group->total), Ops::fma(sum, scale, total));
  }
};

// Records that stand one behind the other, one for each group.
struct RecordPerGroup {
  using Place = const uint8_t*;
  size_t first, stride;
  explicit RecordPerGroup(const kt::PanelLayout& layout)
      : first(layout.header_offset + kt::kPanelHeaderBytes), stride(layout.scale_stride) {}
  inline __attribute__((always_inline)) Place at(const uint8_t* panel, int group) const {
    return panel + first + group * stride;
  }
  static inline __attribute__((always_inline)) void prefetch(Place record) { __builtin_prefetch(record, 0, 2); }
};

// Records of kSuperK columns: what these have in common, in kCommonBytes, and then kGroupBytes for each group.
template <int kCommonBytes, int kGroupBytes>
struct RecordOfGroups {
  struct Place {
    const uint8_t* common;
    const uint8_t* own;
  };
  size_t first, stride;
  int groups, log2_groups;
  explicit RecordOfGroups(const kt::PanelLayout& layout)
      : first(layout.header_offset + kt::kPanelHeaderBytes),
        stride(layout.scale_stride),
        groups(kt::kSuperK / layout.group_k),
        log2_groups(__builtin_ctz(groups)) {}
  inline __attribute__((always_inline)) Place at(const uint8_t* panel, int group) const {
    const uint8_t* record = panel + first + (group >> log2_groups) * stride;
    return {record, record + kCommonBytes + (group & (groups - 1)) * kGroupBytes};
  }
  static inline __attribute__((always_inline)) void prefetch(Place place) {
    __builtin_prefetch(place.common, 0, 2);
    __builtin_prefetch(place.own, 0, 2);
  }
};

// What most types have in common.
template <class Ops, kt::ScaleType type>
struct StoredAs {
  static constexpr kt::ScaleType kType = type;
  static constexpr bool kScaled = type != kt::ScaleType::kNone;
  using Records = RecordPerGroup;
  using Step = ScaledStep<Ops>;
  struct Constants {
    Constants() = default;
    Constants(const kt::PanelLayout&, const kt::PanelHeader&) {}
  };
};

// Formats without scales: the sum of all columns is the total.
template <class Ops>
struct NoScales : StoredAs<Ops, kt::ScaleType::kNone> {};

template <class Ops>
struct ScalarScales : StoredAs<Ops, kt::ScaleType::kScalar> {
  static inline __attribute__((always_inline)) ScaledStep<Ops> load(const uint8_t* record, int,
                                                                    const typename ScalarScales::Constants&) {
    float scale;
    __builtin_memcpy(&scale, record, sizeof(scale));
    return {Ops::set(scale)};
  }
};

template <class Ops>
struct F32Scales : StoredAs<Ops, kt::ScaleType::kF32> {
  static inline __attribute__((always_inline)) ScaledStep<Ops> load(const uint8_t* record, int row,
                                                                    const typename F32Scales::Constants&) {
    return {Ops::load(reinterpret_cast<const float*>(record) + row)};
  }
};

template <class Ops>
struct Bf16Scales : StoredAs<Ops, kt::ScaleType::kBf16> {
  static inline __attribute__((always_inline)) ScaledStep<Ops> load(const uint8_t* record, int row,
                                                                    const typename Bf16Scales::Constants&) {
    return {Ops::from_bf16(reinterpret_cast<const uint16_t*>(record) + row)};
  }
};

template <class Ops>
struct F16Scales : StoredAs<Ops, kt::ScaleType::kF16> {
  static inline __attribute__((always_inline)) ScaledStep<Ops> load(const uint8_t* record, int row,
                                                                    const typename F16Scales::Constants&) {
    return {Ops::from_f16(reinterpret_cast<const uint16_t*>(record) + row)};
  }
};

template <class Ops>
struct E8m0Scales : StoredAs<Ops, kt::ScaleType::kE8m0> {
  static inline __attribute__((always_inline)) ScaledStep<Ops> load(const uint8_t* record, int row,
                                                                    const typename E8m0Scales::Constants&) {
    return {Ops::from_e8m0(record + row)};
  }
};

template <class Ops>
struct E4m3Scales : StoredAs<Ops, kt::ScaleType::kE4m3> {
  struct Constants {
    typename Ops::Vec factor;
    Constants() = default;
    // from_e4m3 gives 2^-8 of the value.
    Constants(const kt::PanelLayout&, const kt::PanelHeader& header) : factor(Ops::set(header.factor * 256)) {}
  };
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
