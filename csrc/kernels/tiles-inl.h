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
  // Up to here totals of steps of one sum belong in registers. (Zen 5, 1 thread in L2, 2026-11-21, 512 tokens, three
  // interleaved runs: steps of 16 / 32 / 128 columns reach 366-372 / 409-426 / 448-464 GFLOP/s with totals in memory,
  // 389-402 / 414-426 / 387-441 in registers. Zen 4, 1 thread, AVX512-VNNI, 60 tokens, 2026-11-30: steps of 32 / 64
  // columns 240 / 305 Gop/s in memory, 329 / 373 in registers.)
  static constexpr int kShortStep = Ops::kInteger ? kt::kLargestInt8StepK : 32;
  // Columns of a decoded block.
  static constexpr int kBlockK = static_cast<int>(kDecodedBytes / (kVecs * kWeightBytes)) * Ops::kDotK;
  // What the codes of a block take; the next block's are behind them.
  static constexpr size_t kBlockCodeBytes = static_cast<size_t>(kBlockK) / Codes::kChunkK * Codes::kChunkBytes;
  static constexpr bool kDecodes = Codes::kScaled || Ops::kWidens;  // many tokens: through scratch
  // Behind the block stand what its sums are multiplied by, and the lows of their groups, in fp32.
  static constexpr size_t kScratchBytes =
      kDecodedBytes + kBlockK / kt::kSmallestStepK * 2 * kt::kPanelRows * sizeof(float);

  // A block of one panel ready for the tiles: Weights [k / kDotK][kVecs] and, per sum, a Step of 32 rows.
  struct Block {
    const uint8_t* weights;
    const float* scales;
    int first;                    // column of the call
    int count;                    // columns
    typename Codes::Cursor next;  // codes to fetch meanwhile, as many columns
  };

  // Sums of kTokens x kTileVecs vectors in registers, starting at vector `first_vec` of the panel.
  template <int kTokens, class Step>
  struct Tile {
    static constexpr int kCount = kTokens;
    static constexpr int kUsed = Ops::kTileVecs;
    static constexpr int kRecord = Step::kFloats;
    using Sums = Sum[kTokens][kUsed];
    using Totals = Vec[kTokens][kUsed];

    const kt::GemmArgs& g;
    const Block& block;
    const typename Codes::Tables& tables;
    const uint8_t* w;
    TokenRows<Ops> a;
    int column;  // of the call
    int sum;     // of the call
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
          sum(Ops::kInteger ? block.first / P::sum_of(*g.layout) : 0),
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
    // One column of a pair.
    template <class Load>
    inline __attribute__((always_inline)) void add_column(Sums& sums, Load load, int of_pair) {
      Vec weights[kUsed];
      for (int v = 0; v < kUsed; ++v) weights[v] = load(w + v * kWeightBytes);
      for (int t = 0; t < kTokens; ++t) {
        const Vec x = Ops::set(*a.at(t, column + of_pair));
        for (int v = 0; v < kUsed; ++v) sums[t][v] = Ops::fma(weights[v], x, sums[t][v]);
      }
    }
    // Moves on by `count` columns.
    inline __attribute__((always_inline)) void accumulate(Sums& sums, int count) {
      for (int i = 0; i < count; i += Ops::kDotsAtOnce * Ops::kDotK) {
#pragma GCC unroll 2
        for (int j = 0; j < Ops::kDotsAtOnce; ++j, w += kVecs * kWeightBytes, column += Ops::kDotK) {
          if constexpr (Ops::kByColumn) {
            add_column(sums, Ops::template load_column<0>, 0);
            add_column(sums, Ops::template load_column<1>, 1);
          } else {
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
      }
    }
    // The products of the next `count` columns, all of one sum.
    inline __attribute__((always_inline)) void next_sums(Sums& sums, int count) {
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kUsed; ++v) sums[t][v] = P::open(a.group(t, sum));
      }
      accumulate(sums, count);
    }
    // What kLanes rows from vector `v` on need of a record.
    inline __attribute__((always_inline)) Step step_of(const float* record, int v) const {
      return Step::from_memory(record, first_row + v * kLanes);
    }
    // Adds what steps of several sums came to, the first of them `first_sum`, to the totals (of zero at first).
    inline __attribute__((always_inline)) void add_steps(const Totals& steps, int first_sum, kt::Store store) const {
      for (int t = 0; t < kTokens; ++t) {
        const Vec scale = Ops::set(a.group(t, first_sum)->scale);
        for (int v = 0; v < kUsed; ++v) {
          const Vec before = store == kt::Store::kOverwrite ? Ops::zero() : Ops::load(total(t, v));
          Ops::store(total(t, v), Ops::fma(steps[t][v], scale, before));
        }
      }
    }
    // A token's total after a step of one sum.
    inline __attribute__((always_inline)) Vec added(Vec total, Sum of_step, const Step& step, int t) const {
      if constexpr (Ops::kInteger) {
        const kt::RowGroup* group = a.group(t, sum);
        return Ops::fma(step.add(Ops::zero(), P::close(of_step), group), Ops::set(group->scale), total);
      } else {
        return step.add(total, P::close(of_step), nullptr);
      }
    }
  };

  static inline int least(int a, int b) { return a < b ? a : b; }

  // Ways with the same arithmetic. Without scales the sums are the totals.
  struct Unscaled {
    static constexpr int kMostTokens = Ops::kTileTokens;
    template <class T>
    static inline __attribute__((always_inline)) void run(T tile, kt::Store store) {
      typename T::Totals sums;
      tile.load(sums, store);
      tile.accumulate(sums, tile.block.count);
      tile.save(sums);
    }
  };

  // With scales and one sum a step, all registers for sums: totals wait in memory. Best for long steps.
  struct TotalsInMemory {
    static constexpr int kMostTokens = Ops::kTileTokens;
    template <class T>
    static inline __attribute__((always_inline)) void run(T tile, kt::Store store) {
      const float* record = tile.block.scales;
      const int step_k = P::step_of(*tile.g.layout);
      for (int k = 0; k < tile.block.count; k += step_k, record += T::kRecord, ++tile.sum) {
        typename T::Sums sums;
        tile.next_sums(sums, least(step_k, tile.block.count - k));
        const bool fresh = k == 0 && store == kt::Store::kOverwrite;
        for (int v = 0; v < T::kUsed; ++v) {
          const auto step = tile.step_of(record, v);
          for (int t = 0; t < T::kCount; ++t) {
            float* total = tile.total(t, v);
            Ops::store(total, tile.added(fresh ? Ops::zero() : Ops::load(total), sums[t][v], step, t));
          }
        }
      }
    }
  };

  // The same with half of the registers for totals.
  struct TotalsInRegisters {
    static constexpr int kMostTokens = Ops::kShortStepTokens;
    template <class T>
    static inline __attribute__((always_inline)) void run(T tile, kt::Store store) {
      typename T::Totals totals;
      tile.load(totals, store);
      const float* record = tile.block.scales;
      const int step_k = P::step_of(*tile.g.layout);
      for (int k = 0; k < tile.block.count; k += step_k, record += T::kRecord, ++tile.sum) {
        typename T::Sums sums;
        tile.next_sums(sums, least(step_k, tile.block.count - k));
        for (int v = 0; v < T::kUsed; ++v) {
          const auto step = tile.step_of(record, v);
          for (int t = 0; t < T::kCount; ++t) totals[t][v] = tile.added(totals[t][v], sums[t][v], step, t);
        }
      }
      tile.save(totals);
    }
  };

  // Several sums a step (int8): the step's own total is in registers beside them, totals wait in memory.
  struct StepsInRegisters {
    static constexpr int kMostTokens = Ops::kSumTokens;
    template <class T>
    static inline __attribute__((always_inline)) void run(T tile, kt::Store store) {
      const float* record = tile.block.scales;
      const int step_k = P::step_of(*tile.g.layout), sum_k = P::sum_of(*tile.g.layout);
      for (int k = 0; k < tile.block.count; k += step_k) {
        typename T::Totals steps;
        for (Vec& each : reinterpret_cast<Vec(&)[T::kCount * T::kUsed]>(steps)) each = Ops::zero();
        const int first_sum = tile.sum;
        const int end = least(k + step_k, tile.block.count);
        for (int s = k; s < end; s += sum_k, record += T::kRecord, ++tile.sum) {
          typename T::Sums sums;
          tile.next_sums(sums, least(sum_k, end - s));
          for (int v = 0; v < T::kUsed; ++v) {
            const auto step = tile.step_of(record, v);
            for (int t = 0; t < T::kCount; ++t) {
              steps[t][v] = step.add(steps[t][v], P::close(sums[t][v]), tile.a.group(t, tile.sum));
            }
          }
        }
        tile.add_steps(steps, first_sum, k == 0 ? store : kt::Store::kAccumulate);
      }
    }
  };

  template <class Way, class Step, int kMost>
  static void tile_of(const kt::GemmArgs& g, const Block& block, const typename Codes::Tables& tables, float* columns,
                      int first_token, int first_vec, kt::Store store, int tokens) {
    if (tokens == kMost) {
      Way::run(Tile<kMost, Step>(g, block, tables, first_token, columns, first_vec), store);
    } else if constexpr (kMost > 1) {
      tile_of<Way, Step, kMost - 1>(g, block, tables, columns, first_token, first_vec, store, tokens);
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
  template <class Way, class Step>
  static void tiles_of(const kt::GemmArgs& g, const Block& block, float* columns, kt::Store store) {
    const typename Codes::Tables tables(*g.layout);
    Fetch next = {block.next, block.count / Codes::kChunkK};
    int left = (g.tokens + Way::kMostTokens - 1) / Way::kMostTokens;
    for (int t = 0; t < g.tokens; --left) {
      const int count = (g.tokens - t + left - 1) / left;
      if constexpr (kDecodes) fetch(next, left);
      for (int v = 0; v < kVecs; v += Ops::kTileVecs) {
        tile_of<Way, Step, Way::kMostTokens>(g, block, tables, columns, t, v, store, count);
      }
      t += count;
    }
  }

  template <class Step>
  static void tiles(const kt::GemmArgs& g, const Block& block, float* columns, kt::Store store) {
    if constexpr (!Codes::kScaled) {
      tiles_of<Unscaled, Step>(g, block, columns, store);
    } else {
      if constexpr (Ops::kInteger) {
        if (P::sum_of(*g.layout) < P::step_of(*g.layout)) {
          return tiles_of<StepsInRegisters, Step>(g, block, columns, store);
        }
      }
      if constexpr (Ops::kShortStepTokens != 0) {
        if (P::step_of(*g.layout) <= kShortStep) return tiles_of<TotalsInRegisters, Step>(g, block, columns, store);
      }
      tiles_of<TotalsInMemory, Step>(g, block, columns, store);
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
    const typename Scales::Constants constants(*g.layout, P::header_of(*g.layout, panel));
    const typename Scales::Records records(*g.layout);
    typename P::GroupWalk walk(*g.layout, begin);
    const int sum_k = P::sum_of(*g.layout);
    for (int k = begin; k < begin + count; k += sum_k, record += Scales::Step::kFloats) {
      walk.go_to(k);
      const auto place = records.at(panel, walk.group);
      for (int v = 0; v < kVecs; ++v) Scales::load(place, v * kLanes, constants).to_memory(record, v * kLanes);
    }
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
          const int count = least(kBlockK, g.k_count - k);
          tiles<typename Scales::Step>(g, decoded<Scales>(g, panel, k, count), columns,
                                       k == 0 ? g.store : kt::Store::kAccumulate);
        }
      } else {
        tiles<typename Scales::Step>(g, {Codes::at(*g.layout, panel, g.first_k), nullptr, 0, g.k_count, {}}, columns,
                                     g.store);
      }
    }
  }
};
