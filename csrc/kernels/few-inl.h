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
  static constexpr int kSums = Codes::kSums;

  static inline int least(int a, int b) { return a < b ? a : b; }

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
    const int step_k = P::step_of(layout), sum_k = P::sum_of(layout);
    const int groups_ahead = P::kAheadK / layout.group_k;  // a division at every step would take as long as its sums

    // Columns P::kAheadK further on, in the following panels when these end.
    const auto ahead = [&](int k) __attribute__((always_inline)) {
      const int further = k + P::kAheadK;
      return further < end ? Ahead{panel, further} : Ahead{following, g.first_k + further - end};
    };
    const auto accumulate = [&](Sum(&acc)[kSums][kTokens][kPanels][kVecs], int begin,
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
                  Sum& each = acc[q * kSums / Codes::kDots][t][p][s * Codes::kOutputs + j];
                  each = Ops::dot(each, weights, a.at(t, k - g.first_k + Ops::kDotK * q));
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
      for (int p = 0; p < kPanels; ++p) constants[p] = {layout, P::header_of(layout, panel + p * layout.panel_bytes)};
      const typename Scales::Records records(layout);
      typename P::GroupWalk walk(layout, g.first_k);
      int sum = 0;
      // Sums of `count` columns from `k` on, times their scales, to `to`.
      const auto add_sums = [&](Vec(&to)[kTokens][kPanels][kVecs], int k, int count) __attribute__((always_inline)) {
        Sum acc[kSums][kTokens][kPanels][kVecs];
#pragma GCC unroll 16
        for (int u = 0; u < kSums; ++u) {
#pragma GCC unroll 16
          for (int t = 0; t < kTokens; ++t) {
            const Sum first = P::open(a.group(t, sum + u));
#pragma GCC unroll 16
            for (Sum& each : reinterpret_cast<Sum(&)[kPanels * kVecs]>(acc[u][t])) each = first;
          }
        }
        const Ahead target = ahead(k);
        const int far_group = target.panel == panel ? walk.group + groups_ahead : target.k / layout.group_k;
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) {
          records.prefetch(records.at(target.panel + p * layout.panel_bytes, far_group));
        }
        accumulate(acc, k, count);
#pragma GCC unroll 16
        for (int u = 0; u < kSums; ++u, ++sum) {
#pragma GCC unroll 16
          for (int p = 0; p < kPanels; ++p) {
            const auto place = records.at(panel + p * layout.panel_bytes, walk.group);
#pragma GCC unroll 16
            for (int v = 0; v < kVecs; ++v) {
              const auto scales = Scales::load(place, v * kLanes, constants[p]);
#pragma GCC unroll 16
              for (int t = 0; t < kTokens; ++t) {
                to[t][p][v] = scales.add(to[t][p][v], P::close(acc[u][t][p][v]), a.group(t, sum));
              }
            }
          }
          walk.go_to(k + (u + 1) * sum_k);
        }
      };
      for (int k = g.first_k; k < end; k += step_k) {
        const int step_end = end - k < step_k ? end : k + step_k;
        if constexpr (Ops::kInteger) {
          Vec step[kTokens][kPanels][kVecs];
#pragma GCC unroll 16
          for (Vec& each : reinterpret_cast<Vec(&)[kTokens * kPanels * kVecs]>(step)) each = Ops::zero();
          const int first_sum = sum;
          for (int s = k; s < step_end; s += kSums * sum_k) add_sums(step, s, least(kSums * sum_k, step_end - s));
#pragma GCC unroll 16
          for (int t = 0; t < kTokens; ++t) {
            const Vec scale = Ops::set(a.group(t, first_sum)->scale);
#pragma GCC unroll 16
            for (int i = 0; i < kPanels * kVecs; ++i) {
              Vec& each = reinterpret_cast<Vec(&)[kPanels * kVecs]>(total[t])[i];
              each = Ops::fma(reinterpret_cast<Vec(&)[kPanels * kVecs]>(step[t])[i], scale, each);
            }
          }
        } else {
          add_sums(total, k, step_end - k);
        }
      }
    } else {
      accumulate(reinterpret_cast<Sum(&)[1][kTokens][kPanels][kVecs]>(total), g.first_k, g.k_count);
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
