// One panel as the GEMMs read it: codes by column, scales by group, steps of columns that share a scale. Included by
// gemm-inl.h.

template <class Ops, class Codes>
struct Panel {
  using Vec = typename Ops::Vec;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kVecs = kt::kPanelRows / kLanes;             // vectors across a panel
  static constexpr int kSliceBytes = 4 * kLanes;                    // one vector of codes
  static constexpr int kSlices = Codes::kChunkBytes / kSliceBytes;  // of a chunk
  // Distance of the software prefetch, with the scales beside the codes. (Zen 5, 1 thread, 2026-11-21, cold RAWINT4
  // panels of K = 2048: 2 KiB without the scales and the start of the next panels 68 % of the read bandwidth, 4 KiB
  // with them 95 %. Emerald Rapids, 2 threads, 2026-11-21, shape S, one token: 8 KiB instead of 4 make FP8 6 % faster,
  // MXFP8 10 %, 4-bit codes not; 16 KiB make BF16 4 % slower.)
  static constexpr int kAheadBytes = 4096;
  static constexpr int kAheadK = Codes::kScaled ? 256 : kAheadBytes / Codes::kChunkBytes * Codes::kChunkK;

  static inline __attribute__((always_inline)) const uint8_t* chunk_at(const uint8_t* panel, int k) {
    return panel + static_cast<size_t>(k) * Codes::kChunkBytes / Codes::kChunkK;
  }

  static inline kt::PanelHeader header_of(const kt::PanelLayout& layout, const uint8_t* panel) {
    kt::PanelHeader header;
    __builtin_memcpy(&header, panel + layout.header_offset, sizeof(header));
    return header;
  }

  static inline __attribute__((always_inline)) const uint8_t* record_at(const kt::PanelLayout& layout,
                                                                        const uint8_t* panel, int group) {
    return panel + layout.header_offset + kt::kPanelHeaderBytes + group * layout.scale_stride;
  }

  // The scales of kPanels panels that follow each other.
  template <int kPanels>
  struct Scales {
    const kt::PanelLayout& layout;
    const uint8_t* first;
    Vec factors[kPanels];

    inline __attribute__((always_inline)) Scales(const kt::PanelLayout& l, const uint8_t* panel)
        : layout(l), first(panel) {
      for (int p = 0; p < kPanels; ++p) {
        // from_e4m3 gives 2^-8 of the value.
        factors[p] = Ops::set(header_of(l, panel + p * l.panel_bytes).factor * 256);
      }
    }

    // One branch for all: it is taken at every step.
    inline __attribute__((always_inline)) void load(int group, Vec (&scales)[kPanels][kVecs]) const {
      const uint8_t* record = record_at(layout, first, group);
      const auto each = [&](auto scale) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
          for (int v = 0; v < kVecs; ++v) scales[p][v] = scale(record + p * layout.panel_bytes, p, v * kLanes);
        }
      };
      switch (layout.scale_type) {
        case kt::ScaleType::kScalar:
          return each([](const uint8_t* r, int, int) __attribute__((always_inline)) {
            float scale;
            __builtin_memcpy(&scale, r, sizeof(scale));
            return Ops::set(scale);
          });
        case kt::ScaleType::kF32:
          return each([](const uint8_t* r, int, int row) __attribute__((always_inline)) {
            return Ops::load(reinterpret_cast<const float*>(r) + row);
          });
        case kt::ScaleType::kBf16:
          return each([](const uint8_t* r, int, int row) __attribute__((always_inline)) {
            return Ops::from_bf16(reinterpret_cast<const uint16_t*>(r) + row);
          });
        case kt::ScaleType::kF16:
          return each([](const uint8_t* r, int, int row) __attribute__((always_inline)) {
            return Ops::from_f16(reinterpret_cast<const uint16_t*>(r) + row);
          });
        case kt::ScaleType::kE8m0:
          return each([](const uint8_t* r, int, int row)
                          __attribute__((always_inline)) { return Ops::from_e8m0(r + row); });
        case kt::ScaleType::kE4m3:
          return each([this](const uint8_t* r, int p, int row)
                          __attribute__((always_inline)) { return Ops::mul(Ops::from_e4m3(r + row), factors[p]); });
        case kt::ScaleType::kNone:
          break;
      }
      __builtin_unreachable();
    }
  };

  // Codes made for other Ops give pairs of bf16.
  template <class Decoded>
  static inline __attribute__((always_inline)) typename Ops::Weights own(const Decoded& weights) {
    if constexpr (__is_same(Decoded, typename Ops::Weights)) {
      return weights;
    } else {
      return Ops::widen(weights);
    }
  }

  // total + scale * (sum of a step)
  static inline __attribute__((always_inline)) Vec scaled(Vec sum, Vec scale, Vec total) {
    if constexpr (Codes::kSumFactor != 1) sum = Ops::mul(sum, Ops::set(Codes::kSumFactor));
    return Ops::fma(sum, scale, total);
  }

  // Calls step(k, count, group) for every step of [begin, end).
  template <class Step>
  static inline __attribute__((always_inline)) void for_steps(const kt::PanelLayout& l, int begin, int end, Step step) {
    int group = begin / l.group_k;
    int group_end = (group + 1) * l.group_k;
    for (int k = begin; k < end; k += l.step_k) {
      if (k >= group_end) {
        ++group;
        group_end += l.group_k;
      }
      step(k, end - k < l.step_k ? end - k : l.step_k, group);
    }
  }

  static inline const uint8_t* panel_at(const kt::GemmArgs& g, int p) { return g.panels + p * g.layout->panel_bytes; }
  static inline float* columns_of(const kt::GemmArgs& g, int p) { return g.c + p * kt::kPanelRows; }

  // Rows with a NaN code: NaN times anything is NaN.
  static void spread_nan(const kt::GemmArgs& g) {
    for (int p = 0; p < g.panel_count; ++p) {
      for (uint32_t rows = header_of(*g.layout, panel_at(g, p)).nan_rows; rows != 0; rows &= rows - 1) {
        float* column = columns_of(g, p) + __builtin_ctz(rows);
        for (int t = 0; t < g.tokens; ++t) column[t * g.c_stride] = __builtin_nanf("");
      }
    }
  }
};
