// Many tokens: a block of K of one panel is decoded into scratch that stays in L1, and register tiles of tokens pass
// over it. Included by gemm-inl.h.

template <class Ops, class Codes>
struct ManyTokens {
  using P = Panel<Ops, Codes>;
  using Vec = typename Ops::Vec;
  using Sum = typename Ops::Sum;
  using Weights = typename Ops::Weights;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kVecs = P::kVecs;
  static constexpr int kWeightBytes = sizeof(Weights);  // one vector of decoded weights
  // Decoded weights of one block of a panel, which stay in L1 beside the activations.
  static constexpr size_t kDecodedBytes = size_t{16} << 10;
  // Up to here totals belong in registers. (Zen 5, 1 thread in L2, 2026-11-21, 512 tokens, three interleaved runs:
  // steps of 16 / 32 / 128 columns reach 366-372 / 409-426 / 448-464 GFLOP/s with totals in memory, 389-402 / 414-426 /
  // 387-441 in registers. Zen 4, 1 thread, AVX512-VNNI, 60 tokens, 2026-11-30: steps of 32 / 64 columns 240 / 305 Gop/s
  // in memory, 329 / 373 in registers.)
  static constexpr int kShortStep = Ops::kInteger ? kt::kLargestInt8StepK : 32;
  // Columns of a decoded block.
  static constexpr int kBlockK = static_cast<int>(kDecodedBytes / (kVecs * kWeightBytes)) * Ops::kDotK;
  // What the codes of a block take; the next block's are behind them.
  static constexpr size_t kBlockCodeBytes = static_cast<size_t>(kBlockK) / Codes::kChunkK * Codes::kChunkBytes;
  static constexpr bool kDecodes = Codes::kScaled || Ops::kWidens;  // many tokens: through scratch
  // Behind the block stand the scales of its steps, in fp32.
  static constexpr size_t kScratchBytes = kDecodedBytes + kBlockK / kt::kSmallestStepK * kt::kPanelRows * sizeof(float);

  // A block of one panel ready for the tiles: Weights [k / kDotK][kVecs] and, per step, its 32 scales in fp32.
  struct Block {
    const uint8_t* weights;
    const float* scales;
    int first;                    // column of the call
    int count;                    // columns
    typename Codes::Cursor next;  // codes to fetch meanwhile, as many columns
  };

  // Sums of kTokens x kTileVecs vectors in registers, starting at vector `first_vec` of the panel.
  template <int kTokens>
  struct Tile {
    static constexpr int kUsed = Ops::kTileVecs;
    using Sums = Sum[kTokens][kUsed];
    using Totals = Vec[kTokens][kUsed];

    const kt::GemmArgs& g;
    const Block& block;
    const typename Codes::Tables& tables;
    const uint8_t* w;
    TokenRows<Ops> a;
    int column;  // of the call
    int step;    // of the call
    float* c;
    size_t c_stride;
    int first_row;

    inline __attribute__((always_inline)) Tile(const kt::GemmArgs& args, const Block& decoded,
                                               const typename Codes::Tables& t, int first_token, float* columns,
                                               int first_vec)
        : g(args),
          block(decoded),
          tables(t),
          w(block.weights + first_vec * kWeightBytes),
          a{g.a.data + first_token * g.a.stride, g.a.groups + first_token * g.a.stride, g.a.stride},
          column(block.first),
          step(Ops::kInteger ? block.first / P::step_of(*g.layout) : 0),
          c(columns + first_token * g.c_stride + first_vec * kLanes),
          c_stride(g.c_stride),
          first_row(first_vec * kLanes) {
      // The next tile's totals come from L2 or beyond.
      for (int t = kTokens; t < 2 * kTokens; ++t) __builtin_prefetch(c + t * c_stride, 1, 3);
    }

    inline __attribute__((always_inline)) float* total(int t, int v) const { return c + t * c_stride + v * kLanes; }

    inline __attribute__((always_inline)) void load(Totals& totals, kt::Store store) const {
      if (store == kt::Store::kOverwrite) {
        for (Vec& total : reinterpret_cast<Vec(&)[kTokens * kUsed]>(totals)) total = Ops::zero();
        return;
      }
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kUsed; ++v) totals[t][v] = Ops::load(total(t, v));
      }
    }
    inline __attribute__((always_inline)) void save(const Totals& totals) const {
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kUsed; ++v) Ops::store(total(t, v), totals[t][v]);
      }
    }
    // Moves on by `count` columns.
    inline __attribute__((always_inline)) void accumulate(Sums& sums, int count) {
      for (int i = 0; i < count; i += Ops::kDotK, w += kVecs * kWeightBytes, column += Ops::kDotK) {
        Weights weights[kUsed];
        for (int v = 0; v < kUsed; ++v) {
          if constexpr (!kDecodes) __builtin_prefetch(w + v * kWeightBytes + P::kAheadBytes, 0, 3);
          weights[v] = Ops::load_weights(w + v * kWeightBytes);
        }
        for (int t = 0; t < kTokens; ++t) {
          for (int v = 0; v < kUsed; ++v) sums[t][v] = Ops::dot(sums[t][v], weights[v], a.at(t, column));
        }
      }
    }
    // The sums of the next step, which begins `k` columns into the block.
    inline __attribute__((always_inline)) void next_step(Sums& sums, int k) {
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kUsed; ++v) sums[t][v] = P::open(tables, a.group(t, step));
      }
      const int step_k = P::step_of(*g.layout);
      accumulate(sums, block.count - k < step_k ? block.count - k : step_k);
    }
    // Adds a token's sum of the step to a total.
    inline __attribute__((always_inline)) Vec added(Vec total, Sum sum, const ScaledStep<Ops>& scales, int t) const {
      return scales.add(total, P::close(sum), a.group(t, step));
    }
    inline __attribute__((always_inline)) ScaledStep<Ops> scales(const float* record, int v) const {
      return ScaledStep<Ops>::from_memory(record, first_row + v * kLanes);
    }
  };

  // Three ways with the same arithmetic: without scales the sums are the totals.
  struct Unscaled {
    static constexpr int kMostTokens = Ops::kTileTokens;
    template <int kTokens>
    static inline __attribute__((always_inline)) void run(Tile<kTokens> tile, kt::Store store) {
      typename Tile<kTokens>::Totals sums;
      tile.load(sums, store);
      tile.accumulate(sums, tile.block.count);
      tile.save(sums);
    }
  };

  // With scales, all registers for the sums of a step: totals wait in memory. Best for long steps.
  struct TotalsInMemory {
    static constexpr int kMostTokens = Ops::kTileTokens;
    template <int kTokens>
    static inline __attribute__((always_inline)) void run(Tile<kTokens> tile, kt::Store store) {
      const float* record = tile.block.scales;
      const int step_k = P::step_of(*tile.g.layout);
      for (int k = 0; k < tile.block.count; k += step_k, record += kt::kPanelRows, ++tile.step) {
        typename Tile<kTokens>::Sums sums;
        tile.next_step(sums, k);
        const bool fresh = k == 0 && store == kt::Store::kOverwrite;
        for (int v = 0; v < Tile<kTokens>::kUsed; ++v) {
          const ScaledStep<Ops> scales = tile.scales(record, v);
          for (int t = 0; t < kTokens; ++t) {
            float* total = tile.total(t, v);
            Ops::store(total, tile.added(fresh ? Ops::zero() : Ops::load(total), sums[t][v], scales, t));
          }
        }
      }
    }
  };

  // With scales, half of the registers for totals.
  struct TotalsInRegisters {
    static constexpr int kMostTokens = Ops::kShortStepTokens;
    template <int kTokens>
    static inline __attribute__((always_inline)) void run(Tile<kTokens> tile, kt::Store store) {
      typename Tile<kTokens>::Totals totals;
      tile.load(totals, store);
      const float* record = tile.block.scales;
      const int step_k = P::step_of(*tile.g.layout);
      for (int k = 0; k < tile.block.count; k += step_k, record += kt::kPanelRows, ++tile.step) {
        typename Tile<kTokens>::Sums sums;
        tile.next_step(sums, k);
        for (int v = 0; v < Tile<kTokens>::kUsed; ++v) {
          const ScaledStep<Ops> scales = tile.scales(record, v);
          for (int t = 0; t < kTokens; ++t) totals[t][v] = tile.added(totals[t][v], sums[t][v], scales, t);
        }
      }
      tile.save(totals);
    }
  };

  template <class Way, int kMost>
  static void tile_of(const kt::GemmArgs& g, const Block& block, const typename Codes::Tables& tables, float* columns,
                      int first_token, int first_vec, kt::Store store, int tokens) {
    if (tokens == kMost) {
      Way::template run<kMost>(Tile<kMost>(g, block, tables, first_token, columns, first_vec), store);
    } else if constexpr (kMost > 1) {
      tile_of<Way, kMost - 1>(g, block, tables, columns, first_token, first_vec, store, tokens);
    }
  }

  // Chunks that are fetched while tiles pass over the block before, some before each tile: as many at once as a block
  // has would wait for each other. (Zen 4, 2 threads, shape S, RAWINT4 with int8 activations, 1024 tokens, 2026-11-30:
  // 56 % of the int8 peak instead of 53 %.)
  struct Fetch {
    typename Codes::Cursor chunk;
    int chunks;
  };
  static inline void fetch(Fetch& next, int tiles_left) {
    const int count = (next.chunks + tiles_left - 1) / tiles_left;
    next.chunks -= count;
    for (int i = 0; i < count; ++i, next.chunk = Codes::next(next.chunk)) Codes::prefetch(next.chunk);
  }

  // All tokens over one block, in tiles of nearly equal size: a short last tile would leave its adders idle.
  template <class Way>
  static void tiles_of(const kt::GemmArgs& g, const Block& block, float* columns, kt::Store store) {
    const typename Codes::Tables tables(*g.layout);
    Fetch next = {block.next, block.count / Codes::kChunkK};
    int left = (g.tokens + Way::kMostTokens - 1) / Way::kMostTokens;
    for (int t = 0; t < g.tokens; --left) {
      const int count = (g.tokens - t + left - 1) / left;
      if constexpr (kDecodes) fetch(next, left);
      for (int v = 0; v < kVecs; v += Ops::kTileVecs) {
        tile_of<Way, Way::kMostTokens>(g, block, tables, columns, t, v, store, count);
      }
      t += count;
    }
  }

  static void tiles(const kt::GemmArgs& g, const Block& block, float* columns, kt::Store store) {
    if constexpr (!Codes::kScaled) {
      tiles_of<Unscaled>(g, block, columns, store);
    } else if constexpr (Ops::kShortStepTokens == 0) {
      tiles_of<TotalsInMemory>(g, block, columns, store);
    } else if (P::step_of(*g.layout) <= kShortStep) {
      tiles_of<TotalsInRegisters>(g, block, columns, store);
    } else {
      tiles_of<TotalsInMemory>(g, block, columns, store);
    }
  }

  static void decode_codes(const kt::GemmArgs& g, const uint8_t* panel, int begin, int count) {
    const typename Codes::Tables tables(*g.layout);
    typename Codes::Cursor chunk = Codes::at(*g.layout, panel, begin);
    uint8_t* out = g.scratch;
    for (int k = 0; k < count; k += Codes::kChunkK, chunk = Codes::next(chunk)) {
      for (int s = 0; s < Codes::kSlices; ++s) {
        typename Codes::Decoded decoded[Codes::kDots][Codes::kOutputs];
        Codes::decode(tables, chunk, s, decoded);
        for (int q = 0; q < Codes::kDots; ++q) {
          for (int j = 0; j < Codes::kOutputs; ++j) {
            Ops::store_weights(out + (q * kVecs + s * Codes::kOutputs + j) * kWeightBytes,
                               P::own(Codes::weights(decoded[q][j])));
          }
        }
      }
      out += Codes::kDots * kVecs * kWeightBytes;
    }
  }

  template <class Scales>
  static void decode_scales(const kt::GemmArgs& g, const uint8_t* panel, int begin, int count, float* record) {
    const auto constants = Scales::constants(P::header_of(*g.layout, panel));
    P::for_steps(*g.layout, begin, begin + count, [&](int, int, int group) {
      const uint8_t* stored = P::record_at(*g.layout, panel, group);
      for (int v = 0; v < kVecs; ++v) Scales::load(stored, v * kLanes, constants).to_memory(record, v * kLanes);
      record += kt::kPanelRows;
    });
  }

  template <class Scales>
  static Block decoded(const kt::GemmArgs& g, const uint8_t* panel, int begin, int count) {
    decode_codes(g, panel, g.first_k + begin, count);
    float* const scales = reinterpret_cast<float*>(g.scratch + kDecodedBytes);
    if constexpr (Scales::kScaled) decode_scales<Scales>(g, panel, g.first_k + begin, count, scales);
    const typename Codes::Cursor codes = Codes::at(*g.layout, panel, g.first_k + begin);
    return {g.scratch, scales, begin, count, Codes::shifted(codes, kBlockCodeBytes)};
  }

  template <class Scales>
  static void run(const kt::GemmArgs& g, Scales) {
    for (int p = 0; p < g.panel_count; ++p) {
      const uint8_t* panel = P::panel_at(g, p);
      float* columns = P::columns_of(g, p);
      if constexpr (kDecodes) {
        for (int k = 0; k < g.k_count; k += kBlockK) {
          const int count = g.k_count - k < kBlockK ? g.k_count - k : kBlockK;
          tiles(g, decoded<Scales>(g, panel, k, count), columns, k == 0 ? g.store : kt::Store::kAccumulate);
        }
      } else {
        tiles(g, {Codes::at(*g.layout, panel, g.first_k), nullptr, 0, g.k_count, {}}, columns, g.store);
      }
    }
  }
};
