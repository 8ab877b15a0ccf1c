// Up to Ops::kFewTokens tokens: codes are decoded in registers, every byte is read once and memory sets the pace.
// Included by gemm-inl.h.

template <class Ops, class Codes, class Scales>
struct FewTokens {
  using P = Panel<Ops, Codes>;
  using Vec = typename Ops::Vec;
  using Sum = typename Ops::Sum;
  using Weights = typename Ops::Weights;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kVecs = P::kVecs;

  struct Ahead {
    const uint8_t* panel;
    int k;
  };

  // kTokens x kPanels whole panels in registers, all of the call's columns; from panel `first` on.
  template <int kTokens, int kPanels>
  static inline __attribute__((always_inline)) void few(const kt::GemmArgs& g, int first) {
    const uint8_t* panel = P::panel_at(g, first);
    const uint8_t* const following = first + kPanels < g.panel_count ? P::panel_at(g, first + kPanels) : g.next_panels;
    float* c = P::columns_of(g, first);
    const kt::PanelLayout& layout = *g.layout;
    const TokenRows<Ops> a = {g.a.data, g.a.groups, g.a.stride};
    const typename Codes::Tables tables(layout);
    const int end = g.first_k + g.k_count;

    // Columns P::kAheadK further on, in the following panels when these end.
    const auto ahead = [&](int k) __attribute__((always_inline)) {
      const int further = k + P::kAheadK;
      return further < end ? Ahead{panel, further} : Ahead{following, g.first_k + further - end};
    };
    const auto accumulate = [&](Sum(&acc)[kTokens][kPanels][kVecs], int begin,
                                int count) __attribute__((always_inline)) {
      typename Codes::Cursor chunk = Codes::at(layout, panel, begin);
      const Ahead target = ahead(begin);
      typename Codes::Cursor far = Codes::at(layout, target.panel, target.k);
      for (int k = begin; k < begin + count; k += Codes::kChunkK, chunk = Codes::next(chunk)) {
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) {
          Codes::prefetch(Codes::shifted(far, p * layout.panel_bytes));
#pragma GCC unroll 16
          for (int s = 0; s < Codes::kSlices; ++s) {
            typename Codes::Decoded decoded[Codes::kDots][Codes::kOutputs];
            Codes::decode(tables, Codes::shifted(chunk, p * layout.panel_bytes), s, decoded);
#pragma GCC unroll 16
            for (int q = 0; q < Codes::kDots; ++q) {
#pragma GCC unroll 16
              for (int j = 0; j < Codes::kOutputs; ++j) {
                const Weights weights = P::own(Codes::weights(decoded[q][j]));
#pragma GCC unroll 16
                for (int t = 0; t < kTokens; ++t) {
                  Sum& sum = acc[t][p][s * Codes::kOutputs + j];
                  sum = Ops::dot(sum, weights, a.at(t, k - g.first_k + Ops::kDotK * q));
                }
              }
            }
          }
        }
        far = Codes::next(far);
      }
    };

    Vec total[kTokens][kPanels][kVecs];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) {
          const float* from = c + t * g.c_stride + p * kt::kPanelRows + v * kLanes;
          total[t][p][v] = g.store == kt::Store::kAccumulate ? Ops::load(from) : Ops::zero();
        }
      }
    }
    if constexpr (Scales::kScaled) {
      typename Scales::Constants constants[kPanels];
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p)
        constants[p] = Scales::constants(P::header_of(layout, panel + p * layout.panel_bytes));
      const int groups_ahead = P::kAheadK / layout.group_k;  // a division at every step would take as long as its sums
      int step = 0;
      P::for_steps(layout, g.first_k, end, [&](int k, int count, int group) __attribute__((always_inline)) {
        Sum acc[kTokens][kPanels][kVecs];
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
          const Sum first = P::open(tables, a.group(t, step));
#pragma GCC unroll 16
          for (Sum& sum : reinterpret_cast<Sum(&)[kPanels * kVecs]>(acc[t])) sum = first;
        }
        const Ahead target = ahead(k);
        const int far_group = target.panel == panel ? group + groups_ahead : target.k / layout.group_k;
        const uint8_t* far = P::record_at(layout, target.panel, far_group);
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) __builtin_prefetch(far + p * layout.panel_bytes, 0, 3);
        accumulate(acc, k, count);
        const uint8_t* record = P::record_at(layout, panel, group);
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
          for (int v = 0; v < kVecs; ++v) {
            const auto scales = Scales::load(record + p * layout.panel_bytes, v * kLanes, constants[p]);
#pragma GCC unroll 16
            for (int t = 0; t < kTokens; ++t) {
              total[t][p][v] = scales.add(total[t][p][v], P::close(acc[t][p][v]), a.group(t, step));
            }
          }
        }
        ++step;
      });
    } else {
      accumulate(total, g.first_k, g.k_count);
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) {
          Ops::store(c + t * g.c_stride + p * kt::kPanelRows + v * kLanes, total[t][p][v]);
        }
      }
    }
  }

  // All panels, as many at once as kFewVectors sums allow.
  template <int kTokens>
  static void panels(const kt::GemmArgs& g) {
    constexpr int kAtOnce = Ops::kFewVectors / (kTokens * kVecs) > 0 ? Ops::kFewVectors / (kTokens * kVecs) : 1;
    int p = 0;
    for (; p + kAtOnce <= g.panel_count; p += kAtOnce) few<kTokens, kAtOnce>(g, p);
    if constexpr (kAtOnce > 2) {
      for (; p + 2 <= g.panel_count; p += 2) few<kTokens, 2>(g, p);
    }
    if constexpr (kAtOnce > 1) {
      for (; p < g.panel_count; ++p) few<kTokens, 1>(g, p);
    }
  }

  template <int kMost>
  static void of(const kt::GemmArgs& g) {
    if (g.tokens == kMost) {
      panels<kMost>(g);
    } else if constexpr (kMost > 1) {
      of<kMost - 1>(g);
    }
  }

  static void run(const kt::GemmArgs& g) { of<Ops::kFewTokens>(g); }
};
