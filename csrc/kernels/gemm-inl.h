// Register-blocked panel GEMM for vector units, compiled once per instruction set and code type (no include guard: each
// including file instantiates it in its own anonymous namespace with its own `Ops` and `Codes`).
//
// Ops provides, for vectors of kLanes fp32:
//   Vec, Element (activation element), Weights (kLanes output rows x one pair of columns)
//   zero(), set(float), load(const float*), store(float*, Vec), mul, fma, from_bf16 and the like for scales
//   load_weights, store_weights                 to and from scratch
//   dot(Vec acc, Weights, const Element* pair)  acc + w[k] * a[k] + w[k+1] * a[k+1], in that order
//   kWidens                                     Weights are wider than pairs of bf16
//   kTileTokens, kTileVecs                      register tile for many tokens
//   kShortStepTokens                            tokens of a tile that keeps totals in registers, 0 = too few of them
//   kFewTokens, kFewVectors                     up to so many tokens without scratch; sums side by side then
// Codes (codes-inl.h, e4m3*-inl.h) turns one vector of stored codes, a slice, into Weights.
//
// Few tokens: codes are decoded in registers, every byte is read once and memory sets the pace. Many tokens: a block of
// K of one panel is decoded into scratch that stays in L1, and register tiles of tokens pass over it. Both do the same
// arithmetic in the same order.

template <class Ops, class Codes>
struct PanelGemm {
  using Vec = typename Ops::Vec;
  using Element = typename Ops::Element;
  using Weights = typename Ops::Weights;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kVecs = kt::kPanelRows / kLanes;             // vectors across a panel
  static constexpr int kSliceBytes = 4 * kLanes;                    // one vector of codes
  static constexpr int kSlices = Codes::kChunkBytes / kSliceBytes;  // of a chunk
  static constexpr int kWeightBytes = sizeof(Weights);              // one vector of decoded weights
  // Up to here totals belong in registers. (Zen 5, 1 thread in L2, 2026-11-21, 512 tokens, three interleaved runs:
  // steps of 16 / 32 / 128 columns reach 366-372 / 409-426 / 448-464 GFLOP/s with totals in memory, 389-402 / 414-426 /
  // 387-441 in registers.)
  static constexpr int kShortStep = 32;
  // Columns of a decoded block.
  static constexpr int kBlockK = static_cast<int>(kt::kDecodedBytes / (kVecs * kWeightBytes)) * 2;
  static constexpr bool kDecodes = Codes::kScaled || Ops::kWidens;  // many tokens: through scratch
  // Distance of the software prefetch in bytes of codes, and that of the scales beside them. (Zen 5, 1 thread,
  // 2026-11-21, cold RAWINT4 panels of K = 2048: 2 KiB without the scales and the start of the next panels 68 % of the
  // read bandwidth, 4 KiB with them 95 %.)
  static constexpr int kAheadBytes = 4096;
  static constexpr int kAheadK = kAheadBytes / Codes::kChunkBytes * Codes::kChunkK;

  static inline __attribute__((always_inline)) const uint8_t* chunk_at(const uint8_t* panel, int k) {
    return panel + static_cast<size_t>(k) * Codes::kChunkBytes / Codes::kChunkK;
  }

  static inline kt::PanelHeader header_of(const kt::PanelLayout& layout, const uint8_t* panel) {
    kt::PanelHeader header;
    __builtin_memcpy(&header, panel + layout.header_offset, sizeof(header));
    return header;
  }

  // ---- scales ----

  struct Scales {
    const uint8_t* records;
    const kt::PanelLayout& layout;
    float factor;

    Scales(const kt::PanelLayout& l, const uint8_t* panel)
        : records(panel + l.header_offset + kt::kPanelHeaderBytes),
          layout(l),
          factor(header_of(l, panel).factor * 256) {}  // from_e4m3 gives 2^-8 of the value

    inline __attribute__((always_inline)) const uint8_t* record(int group) const {
      return records + group * layout.scale_stride;
    }

    inline __attribute__((always_inline)) Vec at(int group, int vec) const {
      const uint8_t* r = record(group);
      const int row = vec * kLanes;
      switch (layout.scale_type) {
        case kt::ScaleType::kScalar: {
          float scale;
          __builtin_memcpy(&scale, r, sizeof(scale));
          return Ops::set(scale);
        }
        case kt::ScaleType::kF32:
          return Ops::load(reinterpret_cast<const float*>(r) + row);
        case kt::ScaleType::kBf16:
          return Ops::from_bf16(reinterpret_cast<const uint16_t*>(r) + row);
        case kt::ScaleType::kF16:
          return Ops::from_f16(reinterpret_cast<const uint16_t*>(r) + row);
        case kt::ScaleType::kE8m0:
          return Ops::from_e8m0(r + row);
        case kt::ScaleType::kE4m3:
          return Ops::mul(Ops::from_e4m3(r + row), Ops::set(factor));
        case kt::ScaleType::kNone:
          break;
      }
      __builtin_unreachable();
    }
  };

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

  // ---- few tokens ----

  struct Ahead {
    const uint8_t* panel;
    int k;
  };

  // kTokens x kPanels whole panels in registers, all of the call's columns.
  template <int kTokens, int kPanels>
  static inline __attribute__((always_inline)) void few(const kt::GemmArgs& g, const uint8_t* panel, float* c) {
    const kt::PanelLayout& layout = *g.layout;
    const Element* a = static_cast<const Element*>(g.a) - g.first_k;
    const typename Codes::Tables tables(layout);
    const int end = g.first_k + g.k_count;

    // Columns kAheadK further on, in the next panels when these end.
    const auto ahead = [&](int k) __attribute__((always_inline)) {
      const int further = k + kAheadK;
      return further < end ? Ahead{panel, further} : Ahead{panel + kPanels * layout.panel_bytes, further - end};
    };
    const auto accumulate = [&](Vec(&acc)[kTokens][kPanels][kVecs], int begin,
                                int count) __attribute__((always_inline)) {
      const uint8_t* chunk = chunk_at(panel, begin);
      const Ahead target = ahead(begin);
      const uint8_t* far = chunk_at(target.panel, target.k);
      for (int k = begin; k < begin + count; k += Codes::kChunkK, chunk += Codes::kChunkBytes) {
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) {
          for (int line = 0; line < Codes::kChunkBytes; line += 64) {
            __builtin_prefetch(far + p * layout.panel_bytes + line, 0, 3);
          }
#pragma GCC unroll 16
          for (int s = 0; s < kSlices; ++s) {
            typename Codes::Decoded decoded[Codes::kPairs][Codes::kOutputs];
            Codes::decode(tables, chunk + p * layout.panel_bytes + s * kSliceBytes, decoded);
#pragma GCC unroll 16
            for (int q = 0; q < Codes::kPairs; ++q) {
#pragma GCC unroll 16
              for (int j = 0; j < Codes::kOutputs; ++j) {
                const Weights weights = Codes::weights(decoded[q][j]);
#pragma GCC unroll 16
                for (int t = 0; t < kTokens; ++t) {
                  Vec& sum = acc[t][p][s * Codes::kOutputs + j];
                  sum = Ops::dot(sum, weights, a + t * g.a_stride + k + 2 * q);
                }
              }
            }
          }
        }
        far += Codes::kChunkBytes;
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
    if constexpr (Codes::kScaled) {
      for_steps(layout, g.first_k, end, [&](int k, int count, int group) __attribute__((always_inline)) {
        Vec acc[kTokens][kPanels][kVecs];
#pragma GCC unroll 16
        for (Vec& sum : reinterpret_cast<Vec(&)[kTokens * kPanels * kVecs]>(acc)) sum = Ops::zero();
        const Ahead target = ahead(k);
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) {
          const Scales far(layout, target.panel + p * layout.panel_bytes);
          __builtin_prefetch(far.record(target.k / layout.group_k), 0, 3);
        }
        accumulate(acc, k, count);
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) {
          const Scales scales(layout, panel + p * layout.panel_bytes);
#pragma GCC unroll 16
          for (int v = 0; v < kVecs; ++v) {
            const Vec scale = scales.at(group, v);
#pragma GCC unroll 16
            for (int t = 0; t < kTokens; ++t) total[t][p][v] = scaled(acc[t][p][v], scale, total[t][p][v]);
          }
        }
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
  static void few_panels(const kt::GemmArgs& g) {
    constexpr int kAtOnce = Ops::kFewVectors / (kTokens * kVecs) > 0 ? Ops::kFewVectors / (kTokens * kVecs) : 1;
    int p = 0;
    for (; p + kAtOnce <= g.panel_count; p += kAtOnce) few<kTokens, kAtOnce>(g, panel_at(g, p), columns_of(g, p));
    if constexpr (kAtOnce > 2) {
      for (; p + 2 <= g.panel_count; p += 2) few<kTokens, 2>(g, panel_at(g, p), columns_of(g, p));
    }
    if constexpr (kAtOnce > 1) {
      for (; p < g.panel_count; ++p) few<kTokens, 1>(g, panel_at(g, p), columns_of(g, p));
    }
  }

  template <int kMost>
  static void few_of(const kt::GemmArgs& g) {
    if (g.tokens == kMost) {
      few_panels<kMost>(g);
    } else if constexpr (kMost > 1) {
      few_of<kMost - 1>(g);
    }
  }

  // ---- many tokens ----

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
          if constexpr (!kDecodes) __builtin_prefetch(w + v * kWeightBytes + kAheadBytes, 0, 3);
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
            Ops::store(total, scaled(sums[t][v], scale, fresh ? Ops::zero() : Ops::load(total)));
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
          for (int t = 0; t < kTokens; ++t) totals[t][v] = scaled(sums[t][v], scale, totals[t][v]);
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
    const uint8_t* chunk = chunk_at(panel, begin);
    uint8_t* out = g.scratch;
    for (int k = 0; k < count; k += Codes::kChunkK, chunk += Codes::kChunkBytes) {
      for (int line = 0; line < Codes::kChunkBytes; line += 64) __builtin_prefetch(chunk + line + kAheadBytes, 0, 3);
      for (int s = 0; s < kSlices; ++s) {
        typename Codes::Decoded decoded[Codes::kPairs][Codes::kOutputs];
        Codes::decode(tables, chunk + s * kSliceBytes, decoded);
        for (int q = 0; q < Codes::kPairs; ++q) {
          for (int j = 0; j < Codes::kOutputs; ++j) {
            Ops::store_weights(out + (q * kVecs + s * Codes::kOutputs + j) * kWeightBytes,
                               Codes::weights(decoded[q][j]));
          }
        }
      }
      out += Codes::kPairs * kVecs * kWeightBytes;
    }
    float* const scales = reinterpret_cast<float*>(g.scratch + kt::kDecodedBytes);
    if constexpr (Codes::kScaled) {
      const Scales stored(*g.layout, panel);
      float* record = scales;
      for_steps(*g.layout, begin, begin + count, [&](int, int, int group) {
        for (int v = 0; v < kVecs; ++v) Ops::store(record + v * kLanes, stored.at(group, v));
        record += kt::kPanelRows;
      });
    }
    return {g.scratch, scales, count};
  }

  static void many(const kt::GemmArgs& g, const uint8_t* panel, float* c) {
    const Element* a = static_cast<const Element*>(g.a);
    if constexpr (kDecodes) {
      for (int k = 0; k < g.k_count; k += kBlockK) {
        const int count = g.k_count - k < kBlockK ? g.k_count - k : kBlockK;
        tiles(g, decoded(g, panel, g.first_k + k, count), a + k, c, k == 0 ? g.store : kt::Store::kAccumulate);
      }
    } else {
      tiles(g, {chunk_at(panel, g.first_k), nullptr, g.k_count}, a, c, g.store);
    }
  }

  // Rows with a NaN code: NaN times anything is NaN.
  static void spread_nan(const kt::GemmArgs& g) {
    for (int p = 0; p < g.panel_count; ++p) {
      for (uint32_t rows = header_of(*g.layout, panel_at(g, p)).nan_rows; rows != 0; rows &= rows - 1) {
        float* column = columns_of(g, p) + __builtin_ctz(rows);
        for (int t = 0; t < g.tokens; ++t) column[t * g.c_stride] = __builtin_nanf("");
      }
    }
  }

  static inline const uint8_t* panel_at(const kt::GemmArgs& g, int p) { return g.panels + p * g.layout->panel_bytes; }
  static inline float* columns_of(const kt::GemmArgs& g, int p) { return g.c + p * kt::kPanelRows; }

  static void run(const kt::GemmArgs& g) {
    if (g.tokens <= Ops::kFewTokens) {
      few_of<Ops::kFewTokens>(g);
    } else {
      for (int p = 0; p < g.panel_count; ++p) many(g, panel_at(g, p), columns_of(g, p));
    }
    if constexpr (Codes::kScaled) spread_nan(g);
  }
};
