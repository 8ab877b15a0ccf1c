// Many tokens: a block of K of one panel is decoded into scratch that stays in L1, and register tiles of tokens pass
// over it. Included by gemm-inl.h.

template <class Ops, class Codes>
struct ManyTokens {
  using P = Panel<Ops, Codes>;
  using Vec = typename Ops::Vec;
  using Element = typename Ops::Element;
  using Weights = typename Ops::Weights;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kVecs = P::kVecs;
  static constexpr int kWeightBytes = sizeof(Weights);  // one vector of decoded weights
  // Up to here totals belong in registers. (Zen 5, 1 thread in L2, 2026-11-21, 512 tokens, three interleaved runs:
  // steps of 16 / 32 / 128 columns reach 366-372 / 409-426 / 448-464 GFLOP/s with totals in memory, 389-402 / 414-426 /
  // 387-441 in registers.)
  static constexpr int kShortStep = 32;
  // Columns of a decoded block.
  static constexpr int kBlockK = static_cast<int>(kt::kDecodedBytes / (kVecs * kWeightBytes)) * 2;
  static constexpr bool kDecodes = Codes::kScaled || Ops::kWidens;  // many tokens: through scratch

  // A block of one panel ready for the tiles: Weights [k/2][kVecs] and, per step, its 32 scales in fp32.
  struct Block {
    const uint8_t* weights;
    const float* scales;
    int count;  // columns
  };

  // Sums of kTokens x kTileVecs vectors in registers, starting at vector `first_vec` of the panel.
  template <int kTokens>
  struct Tile {
    static constexpr int kUsed = Ops::kTileVecs;
    using Sums = Vec[kTokens][kUsed];

    const kt::GemmArgs& g;
    const uint8_t* w;
    const Element* a;
    float* c;

    inline __attribute__((always_inline)) Tile(const kt::GemmArgs& args, const Block& block, const Element* rows,
                                               float* columns, int first_vec)
        : g(args), w(block.weights + first_vec * kWeightBytes), a(rows), c(columns + first_vec * kLanes) {
      // The next tile's totals come from L2 or beyond.
      for (int t = kTokens; t < 2 * kTokens; ++t) __builtin_prefetch(c + t * g.c_stride, 1, 3);
    }

    inline __attribute__((always_inline)) float* total(int t, int v) const { return c + t * g.c_stride + v * kLanes; }

    static inline __attribute__((always_inline)) void clear(Sums& sums) {
      for (auto& token : sums) {
        for (Vec& v : token) v = Ops::zero();
      }
    }
    inline __attribute__((always_inline)) void load(Sums& sums, kt::Store store) const {
      if (store == kt::Store::kOverwrite) return clear(sums);
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kUsed; ++v) sums[t][v] = Ops::load(total(t, v));
      }
    }
    inline __attribute__((always_inline)) void save(const Sums& sums) const {
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kUsed; ++v) Ops::store(total(t, v), sums[t][v]);
      }
    }
    // Moves on by `pairs` of columns.
    inline __attribute__((always_inline)) void accumulate(Sums& sums, int pairs) {
      for (int i = 0; i < pairs; ++i, w += kVecs * kWeightBytes, a += 2) {
        Weights weights[kUsed];
        for (int v = 0; v < kUsed; ++v) {
          if constexpr (!kDecodes) __builtin_prefetch(w + v * kWeightBytes + P::kAheadBytes, 0, 3);
          weights[v] = Ops::load_weights(w + v * kWeightBytes);
        }
        for (int t = 0; t < kTokens; ++t) {
          for (int v = 0; v < kUsed; ++v) sums[t][v] = Ops::dot(sums[t][v], weights[v], a + t * g.a_stride);
        }
      }
    }
  };

  // Three ways with the same arithmetic: without scales the sums are the totals.
  struct Unscaled {
    static constexpr int kMostTokens = Ops::kTileTokens;
    template <int kTokens>
    static inline __attribute__((always_inline)) void run(Tile<kTokens> tile, const Block& block, int,
                                                          kt::Store store) {
      typename Tile<kTokens>::Sums sums;
      tile.load(sums, store);
      tile.accumulate(sums, block.count / 2);
      tile.save(sums);
    }
  };

  // With scales, all registers for the sums of a step: totals wait in memory. Best for long steps.
  struct TotalsInMemory {
    static constexpr int kMostTokens = Ops::kTileTokens;
    template <int kTokens>
    static inline __attribute__((always_inline)) void run(Tile<kTokens> tile, const Block& block, int first_vec,
                                                          kt::Store store) {
      const float* scales = block.scales + first_vec * kLanes;
      const int step = tile.g.layout->step_k;
      for (int k = 0; k < block.count; k += step, scales += kt::kPanelRows) {
        typename Tile<kTokens>::Sums sums;
        Tile<kTokens>::clear(sums);
        tile.accumulate(sums, (block.count - k < step ? block.count - k : step) / 2);
        const bool fresh = k == 0 && store == kt::Store::kOverwrite;
        for (int v = 0; v < Tile<kTokens>::kUsed; ++v) {
          const Vec scale = Ops::load(scales + v * kLanes);
          for (int t = 0; t < kTokens; ++t) {
            float* total = tile.total(t, v);
            Ops::store(total, P::scaled(sums[t][v], scale, fresh ? Ops::zero() : Ops::load(total)));
          }
        }
      }
    }
  };

  // With scales, half of the registers for totals.
  struct TotalsInRegisters {
    static constexpr int kMostTokens = Ops::kShortStepTokens;
    template <int kTokens>
    static inline __attribute__((always_inline)) void run(Tile<kTokens> tile, const Block& block, int first_vec,
                                                          kt::Store store) {
      const float* scales = block.scales + first_vec * kLanes;
      const int step = tile.g.layout->step_k;
      typename Tile<kTokens>::Sums totals;
      tile.load(totals, store);
      for (int k = 0; k < block.count; k += step, scales += kt::kPanelRows) {
        typename Tile<kTokens>::Sums sums;
        Tile<kTokens>::clear(sums);
        tile.accumulate(sums, (block.count - k < step ? block.count - k : step) / 2);
        for (int v = 0; v < Tile<kTokens>::kUsed; ++v) {
          const Vec scale = Ops::load(scales + v * kLanes);
          for (int t = 0; t < kTokens; ++t) totals[t][v] = P::scaled(sums[t][v], scale, totals[t][v]);
        }
      }
      tile.save(totals);
    }
  };

  template <class Way, int kMost>
  static void tile_of(const kt::GemmArgs& g, const Block& block, const Element* a, float* c, int first_vec,
                      kt::Store store, int tokens) {
    if (tokens == kMost) {
      Way::template run<kMost>(Tile<kMost>(g, block, a, c, first_vec), block, first_vec, store);
    } else if constexpr (kMost > 1) {
      tile_of<Way, kMost - 1>(g, block, a, c, first_vec, store, tokens);
    }
  }

  // All tokens over one block, in tiles of nearly equal size: a short last tile would leave its adders idle.
  template <class Way>
  static void tiles_of(const kt::GemmArgs& g, const Block& block, const Element* a, float* c, kt::Store store) {
    int left = (g.tokens + Way::kMostTokens - 1) / Way::kMostTokens;
    for (int t = 0; t < g.tokens; --left) {
      const int count = (g.tokens - t + left - 1) / left;
      for (int v = 0; v < kVecs; v += Ops::kTileVecs) {
        tile_of<Way, Way::kMostTokens>(g, block, a + t * g.a_stride, c + t * g.c_stride, v, store, count);
      }
      t += count;
    }
  }

  static void tiles(const kt::GemmArgs& g, const Block& block, const Element* a, float* c, kt::Store store) {
    if constexpr (!Codes::kScaled) {
      tiles_of<Unscaled>(g, block, a, c, store);
    } else if constexpr (Ops::kShortStepTokens == 0) {
      tiles_of<TotalsInMemory>(g, block, a, c, store);
    } else if (g.layout->step_k <= kShortStep) {
      tiles_of<TotalsInRegisters>(g, block, a, c, store);
    } else {
      tiles_of<TotalsInMemory>(g, block, a, c, store);
    }
  }

  static Block decoded(const kt::GemmArgs& g, const uint8_t* panel, int begin, int count) {
    const typename Codes::Tables tables(*g.layout);
    const uint8_t* chunk = P::chunk_at(panel, begin);
    uint8_t* out = g.scratch;
    for (int k = 0; k < count; k += Codes::kChunkK, chunk += Codes::kChunkBytes) {
      for (int line = 0; line < Codes::kChunkBytes; line += 64) __builtin_prefetch(chunk + line + P::kAheadBytes, 0, 3);
      for (int s = 0; s < P::kSlices; ++s) {
        typename Codes::Decoded decoded[Codes::kPairs][Codes::kOutputs];
        Codes::decode(tables, chunk + s * P::kSliceBytes, decoded);
        for (int q = 0; q < Codes::kPairs; ++q) {
          for (int j = 0; j < Codes::kOutputs; ++j) {
            Ops::store_weights(out + (q * kVecs + s * Codes::kOutputs + j) * kWeightBytes,
                               P::own(Codes::weights(decoded[q][j])));
          }
        }
      }
      out += Codes::kPairs * kVecs * kWeightBytes;
    }
    float* const scales = reinterpret_cast<float*>(g.scratch + kt::kDecodedBytes);
    if constexpr (Codes::kScaled) {
      const typename P::template Scales<1> stored(*g.layout, panel);
      float* record = scales;
      P::for_steps(*g.layout, begin, begin + count, [&](int, int, int group) {
        Vec scale[1][kVecs];
        stored.load(group, scale);
        for (int v = 0; v < kVecs; ++v) Ops::store(record + v * kLanes, scale[0][v]);
        record += kt::kPanelRows;
      });
    }
    return {g.scratch, scales, count};
  }

  static void panel(const kt::GemmArgs& g, const uint8_t* panel, float* c) {
    const Element* a = static_cast<const Element*>(g.a);
    if constexpr (kDecodes) {
      for (int k = 0; k < g.k_count; k += kBlockK) {
        const int count = g.k_count - k < kBlockK ? g.k_count - k : kBlockK;
        tiles(g, decoded(g, panel, g.first_k + k, count), a + k, c, k == 0 ? g.store : kt::Store::kAccumulate);
      }
    } else {
      tiles(g, {P::chunk_at(panel, g.first_k), nullptr, g.k_count}, a, c, g.store);
    }
  }

  static void run(const kt::GemmArgs& g) {
    for (int p = 0; p < g.panel_count; ++p) panel(g, P::panel_at(g, p), P::columns_of(g, p));
  }
};
