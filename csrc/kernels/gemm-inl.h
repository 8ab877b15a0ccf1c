// Register-blocked panel GEMM for vector units, compiled once per instruction set (no include guard: each including
// file instantiates it in its own anonymous namespace with its own `Ops`).
//
// Ops provides, for vectors of kLanes fp32:
//   Vec, Element (activation element), Weights
//   zero(), load(const float*), store(float*, Vec)
//   weights(const uint8_t*)                          kLanes output rows x one pair of k, as stored in the panel
//   dot(Vec acc, Weights, const Element* pair)       acc + w[k] * a[k] + w[k+1] * a[k+1], in that order
//   kTileTokens, kTileVecs                           register tile for many tokens
//   kPairTokens                                      up to here, two panels at once (more chains of additions)
//   kWideTokens                                      up to here, a whole panel at once (whole cache lines)

template <class Ops>
struct PanelGemm {
  using Vec = typename Ops::Vec;
  using Element = typename Ops::Element;
  static constexpr int kVecs = kt::kPanelRows / Ops::kLanes;    // vectors across a panel
  static constexpr size_t kVecBytes = size_t{4} * Ops::kLanes;  // bytes of one vector of pairs
  static constexpr size_t kPairBytes = kVecBytes * kVecs;       // bytes of one pair of k across a panel
  // Distance of the software prefetch, half a page: far enough for one core to keep 90 % of its share of the memory
  // bandwidth (bench/moe.py, Xeon 6, 2 threads, 2026-11-21); the hardware prefetchers do the rest.
  static constexpr size_t kPrefetchBytes = 2048;

  // kTokens x (kPanels * kUsedVecs) vectors in registers, all of K. With kUsedVecs < kVecs the tile covers a part of
  // one panel, starting at vector `first_vec`.
  template <int kTokens, int kPanels, int kUsedVecs>
  static inline __attribute__((always_inline)) void tile(const kt::GemmArgs& g, const uint8_t* panel, const Element* a,
                                                         float* c, int first_vec) {
    Vec acc[kTokens][kPanels * kUsedVecs];
    const uint8_t* w = panel + first_vec * kVecBytes;
    float* const c_first = c + first_vec * Ops::kLanes;
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kPanels * kUsedVecs; ++v) {
        const float* from = c_first + t * g.c_stride + (v / kUsedVecs) * kt::kPanelRows + (v % kUsedVecs) * Ops::kLanes;
        acc[t][v] = g.store == kt::Store::kAccumulate ? Ops::load(from) : Ops::zero();
      }
    }
    const int pairs = g.k_count / 2;
    for (int k = 0; k < pairs; ++k) {
      typename Ops::Weights weights[kPanels * kUsedVecs];
      for (int v = 0; v < kPanels * kUsedVecs; ++v) {
        const uint8_t* p = w + (v / kUsedVecs) * g.panel_stride + (v % kUsedVecs) * kVecBytes;
        if (v % (64 / kVecBytes) == 0) __builtin_prefetch(p + kPrefetchBytes, 0, 3);
        weights[v] = Ops::weights(p);
      }
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kPanels * kUsedVecs; ++v) {
          acc[t][v] = Ops::dot(acc[t][v], weights[v], a + t * g.a_stride + 2 * k);
        }
      }
      w += kPairBytes;
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kPanels * kUsedVecs; ++v) {
        Ops::store(c_first + t * g.c_stride + (v / kUsedVecs) * kt::kPanelRows + (v % kUsedVecs) * Ops::kLanes,
                   acc[t][v]);
      }
    }
  }

  // Up to kMost tokens: the switch over the token count, unrolled by the compiler.
  template <int kMost, int kPanels, int kUsedVecs>
  static void tail(const kt::GemmArgs& g, const uint8_t* panel, const Element* a, float* c, int first_vec, int tokens) {
    if (tokens == kMost) {
      tile<kMost, kPanels, kUsedVecs>(g, panel, a, c, first_vec);
    } else if constexpr (kMost > 1) {
      tail<kMost - 1, kPanels, kUsedVecs>(g, panel, a, c, first_vec, tokens);
    }
  }

  static void many_tokens(const kt::GemmArgs& g, const uint8_t* panel, float* c) {
    const Element* a = static_cast<const Element*>(g.a);
    for (int t = 0; t < g.tokens; t += Ops::kTileTokens) {
      const int count = g.tokens - t < Ops::kTileTokens ? g.tokens - t : Ops::kTileTokens;
      for (int v = 0; v < kVecs; v += Ops::kTileVecs) {
        tail<Ops::kTileTokens, 1, Ops::kTileVecs>(g, panel, a + t * g.a_stride, c + t * g.c_stride, v, count);
      }
    }
  }

  static void run(const kt::GemmArgs& g) {
    const Element* a = static_cast<const Element*>(g.a);
    int p = 0;
    if (g.tokens <= Ops::kPairTokens) {
      for (; p + 2 <= g.panel_count; p += 2) {
        tail<Ops::kPairTokens, 2, kVecs>(g, g.panels + p * g.panel_stride, a, g.c + p * kt::kPanelRows, 0, g.tokens);
      }
    }
    for (; p < g.panel_count; ++p) {
      const uint8_t* panel = g.panels + p * g.panel_stride;
      float* c = g.c + p * kt::kPanelRows;
      if (g.tokens <= Ops::kWideTokens) {
        tail<Ops::kWideTokens, 1, kVecs>(g, panel, a, c, 0, g.tokens);
      } else {
        many_tokens(g, panel, c);
      }
    }
  }
};
