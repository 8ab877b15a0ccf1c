// One panel as the GEMMs read it: codes by column, scales by group, steps of columns that share a scale (of the
// activations, where those are int8; each group in it has a sum of its own then). Included by
// gemm-inl.h.

template <class Ops, class Codes>
struct Panel {
  using Vec = typename Ops::Vec;
  using Element = typename Ops::Element;
  using Tables = typename Codes::Tables;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kVecs = kt::kPanelRows / kLanes;  // vectors across a panel
  // Distance of the software prefetch, with the scales beside the codes, into L2: into L1 the few lines that it can ask
  // for at once set the pace. (Zen 4, 2026-11-30, 1 / 2 threads, cold panels of K = 2048, one token, share of the read
  // bandwidth: Q4_K 65-69 / 65-84 % into L1 256 columns ahead, 82 / 85-94 % into L2, 81-85 / 88-95 % 512 columns ahead,
  // 81 / 92-94 % 1024; besides into L1 512 bytes ahead 94 / 91 %, but Q8_0 then 78 % instead of 84 % on one.
  // Zen 5, 1 thread, 2026-11-21, cold RAWINT4 into L1: 2 KiB ahead without the scales and the start of the next panels
  // 68 %, 4 KiB with them 95 %. Emerald Rapids, 2 threads, 2026-11-21, shape S, into L1: 8 KiB instead of 4 make FP8
  // 6 % faster, MXFP8 10 %; 16 KiB make BF16 4 % slower.)
  static constexpr int kAheadBytes = 4096;
  static constexpr int kAheadK = Codes::kScaled ? 512 : kAheadBytes / Codes::kChunkBytes * Codes::kChunkK;

  static inline kt::PanelHeader header_of(const kt::PanelLayout& layout, const uint8_t* panel) {
    kt::PanelHeader header;
    __builtin_memcpy(&header, panel + layout.header_offset, sizeof(header));
    return header;
  }

  // Codes made for other Ops give pairs of bf16.
  template <class Decoded>
  static inline __attribute__((always_inline)) typename Ops::Weights own(const Decoded& weights) {
    if constexpr (__is_same(Decoded, typename Ops::Weights)) {
      return weights;
    } else {
      return Ops::widen(weights);
    }
  }

  // A sum, before its first product and after its last.
  static inline __attribute__((always_inline)) typename Ops::Sum open(const kt::RowGroup* group) {
    if constexpr (Ops::kInteger) {
      return Ops::open(group);
    } else {
      return Ops::zero();
    }
  }
  static inline __attribute__((always_inline)) Vec close(typename Ops::Sum sum) {
    if constexpr (Ops::kInteger) {
      return Ops::close(sum);
    } else if constexpr (Codes::kSumFactor != 1) {
      return Ops::mul(sum, Ops::set(Codes::kSumFactor));
    } else {
      return sum;
    }
  }

  // Columns of a step, and of each of its sums.
  static inline __attribute__((always_inline)) int step_of(const kt::PanelLayout& layout) {
    return Ops::kInteger ? layout.int8_step_k : layout.step_k;
  }
  static inline __attribute__((always_inline)) int sum_of(const kt::PanelLayout& layout) {
    return Ops::kInteger ? layout.int8_sum_k : layout.step_k;
  }

  // The group of scales of each sum, ascending.
  struct GroupWalk {
    int group_k;
    int group;
    int group_end;
    inline __attribute__((always_inline)) GroupWalk(const kt::PanelLayout& layout, int k)
        : group_k(layout.group_k), group(k / group_k), group_end((group + 1) * group_k) {}
    // Goes on to the sum that begins with column k.
    inline __attribute__((always_inline)) void go_to(int k) {
      if (k < group_end) return;
      ++group;
      group_end += group_k;
    }
  };

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

// The activations of some tokens, by column and by sum.
template <class Ops>
struct TokenRows {
  const uint8_t* data;
  const uint8_t* groups;
  size_t stride;

  inline __attribute__((always_inline)) const typename Ops::Element* at(int token, int column) const {
    return reinterpret_cast<const typename Ops::Element*>(data + token * stride) + column;
  }
  inline __attribute__((always_inline)) const kt::RowGroup* group(int token, int sum) const {
    return reinterpret_cast<const kt::RowGroup*>(groups + token * stride) + sum;
  }
};
