// Register-blocked panel GEMM for vector units, compiled once per instruction set and code type (no include guard: each
// including file instantiates it in its own anonymous namespace with its own `Ops` and `Codes`).
//
// Ops provides, for vectors of kLanes fp32:
//   Vec, Element (activation element), Pairs (kLanes output rows x one pair of bf16), Weights
//   zero(), set(float), load(const float*), store(float*, Vec), mul, fma
//   load_pairs, store_pairs, widen(Pairs) -> Weights
//   dot(Vec acc, Weights, const Element* pair)       acc + w[k] * a[k] + w[k+1] * a[k+1], in that order
//   kTileTokens, kTileVecs                           register tile for many tokens
//   kPairTokens, kWideTokens                         see run(); kScaledPairTokens, kScaledWideTokens for codes with
//   scales
// Codes (codes-inl.h) turns one vector of stored codes, a slice, into Pairs.
//
// Few tokens: codes are decoded in registers, every byte is read once and memory sets the pace. Many tokens: a block of
// K of one panel is decoded into scratch that stays in L1, and register tiles of tokens pass over it. Both do the same
// arithmetic in the same order.

template <class Ops, class Codes>
struct PanelGemm {
  using Vec = typename Ops::Vec;
  using Element = typename Ops::Element;
  using Pairs = typename Ops::Pairs;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kVecs = kt::kPanelRows / kLanes;             // vectors across a panel
  static constexpr int kSliceBytes = 4 * kLanes;                    // one vector of codes, or of decoded pairs
  static constexpr int kSlices = Codes::kChunkBytes / kSliceBytes;  // of a chunk: all rows, Codes::kChunkK columns
  static constexpr size_t kPairBytes = size_t{4} * kt::kPanelRows;  // a decoded pair of k across a panel
  static constexpr int kPairTokens = Codes::kScaled ? Ops::kScaledPairTokens : Ops::kPairTokens;
  static constexpr int kWideTokens = Codes::kScaled ? Ops::kScaledWideTokens : Ops::kWideTokens;
  // Distance of the software prefetch, half a page: far enough for one core to keep 90 % of its share of the memory
  // bandwidth (bench/moe.py, Xeon 6, 2 threads, 2026-11-21); the hardware prefetchers do the rest.
  static constexpr size_t kPrefetchBytes = 2048;

  // Which vector of the panel the `output`-th result of a slice is.
  static constexpr int vec_of(int slice, int output) { return output * kSlices + slice; }

  static inline __attribute__((always_inline)) const uint8_t* chunk_at(const uint8_t* panel, int k) {
    return panel + static_cast<size_t>(k) * Codes::kChunkBytes / Codes::kChunkK;
  }

  // ---- scales ----

  struct Scales {
    const uint8_t* records;
    const kt::PanelLayout& layout;
    float factor;

    Scales(const kt::PanelLayout& l, const uint8_t* panel) : records(panel + l.scale_offset), layout(l), factor(1) {
      if (l.scale_type != kt::ScaleType::kE4m3) return;
      __builtin_memcpy(&factor, records, sizeof(factor));
      factor *= 256;  // from_e4m3 gives 2^-8 of the value
      records += 64;
    }

    inline __attribute__((always_inline)) Vec at(int group, int vec) const {
      const uint8_t* r = records + group * layout.scale_stride;
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

  // kTokens x kPanels whole panels in registers, all of the call's columns.
  template <int kTokens, int kPanels>
  static inline __attribute__((always_inline)) void few(const kt::GemmArgs& g, const uint8_t* panel, float* c) {
    const kt::PanelLayout& layout = *g.layout;
    const Element* a = static_cast<const Element*>(g.a) - g.first_k;
    const typename Codes::Tables tables(layout);
    const int end = g.first_k + g.k_count;

    const auto accumulate = [&](Vec(&acc)[kTokens][kPanels][kVecs], int begin,
                                int count) __attribute__((always_inline)) {
      const uint8_t* chunk = chunk_at(panel, begin);
      for (int k = begin; k < begin + count; k += Codes::kChunkK, chunk += Codes::kChunkBytes) {
        for (int p = 0; p < kPanels; ++p) {
          for (int line = 0; line < Codes::kChunkBytes; line += 64) {
            __builtin_prefetch(chunk + p * layout.panel_bytes + line + kPrefetchBytes, 0, 3);
          }
          for (int s = 0; s < kSlices; ++s) {
            Pairs pairs[Codes::kPairs][Codes::kOutputs];
            Codes::decode(tables, chunk + p * layout.panel_bytes + s * kSliceBytes, pairs);
            for (int q = 0; q < Codes::kPairs; ++q) {
              for (int j = 0; j < Codes::kOutputs; ++j) {
                const typename Ops::Weights w = Ops::widen(pairs[q][j]);
                for (int t = 0; t < kTokens; ++t) {
                  Vec& sum = acc[t][p][vec_of(s, j)];
                  sum = Ops::dot(sum, w, a + t * g.a_stride + k + 2 * q);
                }
              }
            }
          }
        }
      }
    };

    Vec total[kTokens][kPanels][kVecs];
    for (int t = 0; t < kTokens; ++t) {
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kVecs; ++v) {
          const float* from = c + t * g.c_stride + p * kt::kPanelRows + v * kLanes;
          total[t][p][v] = g.store == kt::Store::kAccumulate ? Ops::load(from) : Ops::zero();
        }
      }
    }
    if constexpr (Codes::kScaled) {
      const Scales scales(layout, panel);
      const Scales scales_of_second(layout, panel + (kPanels - 1) * layout.panel_bytes);
      for_steps(layout, g.first_k, end, [&](int k, int count, int group) __attribute__((always_inline)) {
        Vec acc[kTokens][kPanels][kVecs];
        for (auto& token : acc) {
          for (auto& rows : token) {
            for (Vec& v : rows) v = Ops::zero();
          }
        }
        accumulate(acc, k, count);
        for (int p = 0; p < kPanels; ++p) {
          for (int v = 0; v < kVecs; ++v) {
            const Vec scale = (p == 0 ? scales : scales_of_second).at(group, v);
            for (int t = 0; t < kTokens; ++t) total[t][p][v] = Ops::fma(acc[t][p][v], scale, total[t][p][v]);
          }
        }
      });
    } else {
      accumulate(total, g.first_k, g.k_count);
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kVecs; ++v) {
          Ops::store(c + t * g.c_stride + p * kt::kPanelRows + v * kLanes, total[t][p][v]);
        }
      }
    }
  }

  template <int kMost, int kPanels>
  static void few_of(const kt::GemmArgs& g, const uint8_t* panel, float* c) {
    if (g.tokens == kMost) {
      few<kMost, kPanels>(g, panel, c);
    } else if constexpr (kMost > 1) {
      few_of<kMost - 1, kPanels>(g, panel, c);
    }
  }

  // ---- many tokens ----

  // A block of one panel ready for the tiles: bf16 pairs [k/2][32][2] and, per step, its 32 scales in fp32.
  struct Block {
    const uint8_t* pairs;
    const float* scales;
    int count;  // columns
  };

  // kTokens x kTileVecs vectors in registers, starting at vector `first_vec` of the panel.
  template <int kTokens>
  static inline __attribute__((always_inline)) void tile(const kt::GemmArgs& g, const Block& block, const Element* a,
                                                         float* c, int first_vec, kt::Store store) {
    constexpr int kUsed = Ops::kTileVecs;
    const uint8_t* w = block.pairs + first_vec * kSliceBytes;
    float* const c_first = c + first_vec * kLanes;
    Vec acc[kTokens][kUsed];

    const auto accumulate = [&](int pairs) __attribute__((always_inline)) {
      for (int i = 0; i < pairs; ++i, w += kPairBytes, a += 2) {
        typename Ops::Weights weights[kUsed];
        for (int v = 0; v < kUsed; ++v) {
          if constexpr (!Codes::kScaled) {
            if (v % (64 / kSliceBytes) == 0) __builtin_prefetch(w + v * kSliceBytes + kPrefetchBytes, 0, 3);
          }
          weights[v] = Ops::widen(Ops::load_pairs(w + v * kSliceBytes));
        }
        for (int t = 0; t < kTokens; ++t) {
          for (int v = 0; v < kUsed; ++v) acc[t][v] = Ops::dot(acc[t][v], weights[v], a + t * g.a_stride);
        }
      }
    };

    if constexpr (Codes::kScaled) {
      const float* scales = block.scales + first_vec * kLanes;
      const int step = g.layout->step_k;
      for (int k = 0; k < block.count; k += step, scales += kt::kPanelRows) {
        for (auto& token : acc) {
          for (Vec& v : token) v = Ops::zero();
        }
        accumulate((block.count - k < step ? block.count - k : step) / 2);
        const bool fresh = k == 0 && store == kt::Store::kOverwrite;
        for (int v = 0; v < kUsed; ++v) {
          const Vec scale = Ops::load(scales + v * kLanes);
          for (int t = 0; t < kTokens; ++t) {
            float* total = c_first + t * g.c_stride + v * kLanes;
            Ops::store(total, Ops::fma(acc[t][v], scale, fresh ? Ops::zero() : Ops::load(total)));
          }
        }
      }
    } else {
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kUsed; ++v) {
          acc[t][v] = store == kt::Store::kAccumulate ? Ops::load(c_first + t * g.c_stride + v * kLanes) : Ops::zero();
        }
      }
      accumulate(block.count / 2);
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kUsed; ++v) Ops::store(c_first + t * g.c_stride + v * kLanes, acc[t][v]);
      }
    }
  }

  template <int kMost>
  static void tile_of(const kt::GemmArgs& g, const Block& block, const Element* a, float* c, int first_vec,
                      kt::Store store, int tokens) {
    if (tokens == kMost) {
      tile<kMost>(g, block, a, c, first_vec, store);
    } else if constexpr (kMost > 1) {
      tile_of<kMost - 1>(g, block, a, c, first_vec, store, tokens);
    }
  }

  // All tokens over one block, in tiles of nearly equal size: a short last tile would leave its adders idle.
  static void tiles(const kt::GemmArgs& g, const Block& block, const Element* a, float* c, kt::Store store) {
    int left = (g.tokens + Ops::kTileTokens - 1) / Ops::kTileTokens;
    for (int t = 0; t < g.tokens; --left) {
      const int count = (g.tokens - t + left - 1) / left;
      for (int v = 0; v < kVecs; v += Ops::kTileVecs) {
        tile_of<Ops::kTileTokens>(g, block, a + t * g.a_stride, c + t * g.c_stride, v, store, count);
      }
      t += count;
    }
  }

  static Block decoded(const kt::GemmArgs& g, const uint8_t* panel, int begin, int count) {
    const typename Codes::Tables tables(*g.layout);
    const uint8_t* chunk = chunk_at(panel, begin);
    uint8_t* out = g.scratch;
    for (int k = 0; k < count; k += Codes::kChunkK, chunk += Codes::kChunkBytes) {
      __builtin_prefetch(chunk + kPrefetchBytes, 0, 3);
      for (int s = 0; s < kSlices; ++s) {
        Pairs pairs[Codes::kPairs][Codes::kOutputs];
        Codes::decode(tables, chunk + s * kSliceBytes, pairs);
        for (int q = 0; q < Codes::kPairs; ++q) {
          for (int j = 0; j < Codes::kOutputs; ++j) {
            Ops::store_pairs(out + q * kPairBytes + vec_of(s, j) * kSliceBytes, pairs[q][j]);
          }
        }
      }
      out += Codes::kPairs * kPairBytes;
    }
    float* const scales = reinterpret_cast<float*>(g.scratch + kt::kDecodeBlockK / 2 * kPairBytes);
    const Scales stored(*g.layout, panel);
    float* record = scales;
    for_steps(*g.layout, begin, begin + count, [&](int, int, int group) {
      for (int v = 0; v < kVecs; ++v) Ops::store(record + v * kLanes, stored.at(group, v));
      record += kt::kPanelRows;
    });
    return {g.scratch, scales, count};
  }

  static void many(const kt::GemmArgs& g, const uint8_t* panel, float* c) {
    const Element* a = static_cast<const Element*>(g.a);
    if constexpr (Codes::kScaled) {
      for (int k = 0; k < g.k_count; k += kt::kDecodeBlockK) {
        const int count = g.k_count - k < kt::kDecodeBlockK ? g.k_count - k : kt::kDecodeBlockK;
        tiles(g, decoded(g, panel, g.first_k + k, count), a + k, c, k == 0 ? g.store : kt::Store::kAccumulate);
      }
    } else {
      tiles(g, {chunk_at(panel, g.first_k), nullptr, g.k_count}, a, c, g.store);
    }
  }

  // Up to kPairTokens two panels at once, for more chains of additions; up to kWideTokens one.
  static void run(const kt::GemmArgs& g) {
    int p = 0;
    if (g.tokens <= kPairTokens) {
      for (; p + 2 <= g.panel_count; p += 2) {
        few_of<kPairTokens, 2>(g, g.panels + p * g.layout->panel_bytes, g.c + p * kt::kPanelRows);
      }
    }
    for (; p < g.panel_count; ++p) {
      const uint8_t* panel = g.panels + p * g.layout->panel_bytes;
      float* c = g.c + p * kt::kPanelRows;
      if (g.tokens <= kWideTokens) {
        few_of<kWideTokens, 1>(g, panel, c);
      } else {
        many(g, panel, c);
      }
    }
  }
};
