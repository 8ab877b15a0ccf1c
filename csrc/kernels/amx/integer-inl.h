// Many tokens with int8 activations on AMX: TDPBSSD multiplies a tile of 16 tokens x 64 columns by one of 64 columns x
// 16 output rows. Included behind gemm-inl.h, with the `Ops` and `Codes` of the AVX512 kernel that serves few tokens.
//
// A sum of 64 columns is one tile deep, a sum of 32 or 16 half or a quarter of one. Sums leave the tiles as exact
// 32-bit integers, and vectors add them to the totals as every other kernel does: the same bits.
//
//   B tile    row j = columns 4j .. 4j+3 of 16 output rows, 64 bytes, signed; two side by side are a panel
//   scratch   | what ManyTokens keeps there: decoded weights, the scales of their sums | kSumsAtOnce sums |
//
// Not measured: there was no CPU with AMX. By count, the four products of a 32 x 32 block take 64 cycles for 64
// columns, and its 64 vectors of sums three operations each, about 100 cycles on two ports: sums of 64 reach at most
// two thirds of the tiles' peak, sums of 32 two fifths.
//
// Tiles (of a code type) provides:
//   kInPlace                               panels are B tiles as they are
//   weights(args, panel, begin, count)     B tiles of `count` columns: in the panel, or decoded into scratch

template <class Codes, class Tiles>
struct IntegerTiles {
  using P = Panel<Ops, Codes>;
  using Many = ManyTokens<Ops, Codes>;
  using Block = typename Many::Block;
  static constexpr int kFourBytes = 4 * kt::kPanelRows;  // four columns across a panel
  // Totals stay in registers while so many sums are added, of whole steps: 16 KiB fit L1 beside the block.
  static constexpr int kSumsAtOnce = kt::kLargestInt8StepK / kt::kSmallestStepK;
  static constexpr size_t kSumSize = size_t{kBlockTokens} * kt::kPanelRows;

  static size_t scratch_bytes(int, int) { return Many::kScratchBytes + kSumsAtOnce * kSumSize * sizeof(int32_t); }

  // One sum, of `depth`-column tiles: [32 tokens][32 rows].
  template <bool kBothHalves>
  static inline __attribute__((always_inline)) void multiply(const uint8_t* w, const uint8_t* a, size_t a_stride,
                                                             int columns, int depth, int32_t* sums) {
    _tile_zero(0);
    _tile_zero(1);
    if (kBothHalves) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int k = 0; k < columns; k += depth, w += kFourBytes * (depth / 4), a += depth) {
      _tile_loadd(6, w, kFourBytes);
      _tile_loadd(4, a, a_stride);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(7, w + kLineBytes, kFourBytes);
      _tile_dpbssd(1, 4, 7);
      if (kBothHalves) {
        _tile_loadd(5, a + kTileRows * a_stride, a_stride);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    }
    constexpr int kHalf = kt::kPanelRows / 2;
    _tile_stored(0, sums, kFourBytes);
    _tile_stored(1, sums + kHalf, kFourBytes);
    if (kBothHalves) {
      _tile_stored(2, sums + kTileRows * kt::kPanelRows, kFourBytes);
      _tile_stored(3, sums + kTileRows * kt::kPanelRows + kHalf, kFourBytes);
    }
  }

  // The lines of the sum two steps of 64 columns further on, which may lie in the next panel.
  static inline __attribute__((always_inline)) void fetch_ahead(const uint8_t* w, int columns) {
    const uint8_t* const ahead = w + P::kAheadBytes;
    for (int byte = 0; byte < columns * kt::kPanelRows; byte += kLineBytes) __builtin_prefetch(ahead + byte, 0, 2);
  }

  // Some sums of whole steps, and what they are multiplied by: `first` is the first of them in the call.
  struct Sums {
    const int32_t* values;
    const float* records;
    int first;
    int count;
  };

  // Adds them to a block's totals.
  template <class Step>
  static void add(const kt::GemmArgs& g, const TokenRows<Ops>& a, const Sums& sums, float* c, int tokens,
                  kt::Store store) {
    const int per_step = P::step_of(*g.layout) / P::sum_of(*g.layout);
    for (int t = 0; t < tokens; ++t, c += g.c_stride) {
      for (int v = 0; v < P::kVecs; ++v) {
        const int row = v * P::kLanes;
        __m512 total = store == kt::Store::kOverwrite ? Ops::zero() : Ops::load(c + row);
        for (int s = 0; s < sums.count; s += per_step) {
          __m512 of_step = Ops::zero();
          for (int i = s; i < s + per_step && i < sums.count; ++i) {
            const Step step = Step::from_memory(sums.records + i * Step::kFloats, row);
            const int32_t* sum = sums.values + i * kSumSize + t * kt::kPanelRows + row;
            of_step = step.add(of_step, _mm512_cvtepi32_ps(_mm512_load_si512(sum)), a.group(t, sums.first + i));
          }
          total = Ops::fma(of_step, Ops::set(a.group(t, sums.first + s)->scale), total);
        }
        Ops::store(c + row, total);
      }
    }
  }

  // Up to kBlockTokens tokens, from `first_token` on, over one block of columns.
  template <class Step>
  static void tokens_of(const kt::GemmArgs& g, const Block& block, int depth, int32_t* values, float* columns,
                        int first_token, int tokens, kt::Store store) {
    const TokenRows<Ops> a = {g.a.data + first_token * g.a.stride, g.a.groups + first_token * g.a.stride, g.a.stride};
    float* const c = columns + first_token * g.c_stride;
    const int sum_k = P::sum_of(*g.layout);
    const int sums = (block.count + sum_k - 1) / sum_k;
    for (int s = 0; s < sums; s += kSumsAtOnce) {
      const int now = sums - s < kSumsAtOnce ? sums - s : kSumsAtOnce;
      for (int i = 0; i < now; ++i) {
        const int k = (s + i) * sum_k;
        const int count = block.count - k < sum_k ? block.count - k : sum_k;
        const uint8_t* w = block.weights + k / 4 * kFourBytes;
        const uint8_t* rows = a.data + block.first + k;
        int32_t* const to = values + i * kSumSize;
        if (Tiles::kInPlace && first_token == 0) fetch_ahead(w, count);
        if (tokens > kTileRows) {
          multiply<true>(w, rows, a.stride, count, depth, to);
        } else {
          multiply<false>(w, rows, a.stride, count, depth, to);
        }
      }
      add<Step>(g, a, {values, block.scales + s * Step::kFloats, block.first / sum_k + s, now}, c, tokens,
                s == 0 ? store : kt::Store::kAccumulate);
    }
  }

  template <class Scales>
  static void run(const kt::GemmArgs& g, Scales) {
    const int sum_k = P::sum_of(*g.layout);
    const int depth = g.k_count % sum_k == 0 ? sum_k : kt::kPanelK;  // K that ends within a sum: in half sums
    float* const scales = reinterpret_cast<float*>(g.scratch + Many::kDecodedBytes);
    int32_t* const sums = reinterpret_cast<int32_t*>(g.scratch + Many::kScratchBytes);
    int configured = 0;
    for (int p = 0; p < g.panel_count; ++p) {
      for (int k = 0; k < g.k_count; k += Many::kBlockK) {
        const int count = g.k_count - k < Many::kBlockK ? g.k_count - k : Many::kBlockK;
        const uint8_t* const panel = P::panel_at(g, p);
        Many::template decode_scales<Scales>(g, panel, g.first_k + k, count, scales);
        const Block block = {Tiles::weights(g, panel, g.first_k + k, count), scales, k, count, {}};
        for (int first = 0; first < g.tokens; first += kBlockTokens) {
          const int tokens = g.tokens - first < kBlockTokens ? g.tokens - first : kBlockTokens;
          if (tokens != configured) {
            const TileConfig config(tokens, depth);
            _tile_loadconfig(&config);
            configured = tokens;
          }
          tokens_of<typename Scales::Step>(g, block, depth, sums, P::columns_of(g, p), first, tokens,
                                           k == 0 ? g.store : kt::Store::kAccumulate);
        }
      }
    }
    _tile_release();
  }

  static void many(const kt::GemmArgs& g) {
    Codes::ScaleTypes::template call<Ops>(g.layout->scale_type, [&](auto scales) { run(g, scales); });
    P::spread_nan(g);
  }
};

template <class Codes, class Tiles>
constexpr kt::KernelSet integer_tile_set(const char* name) {
  using Gemm = IntegerTiles<Codes, Tiles>;
  kt::KernelSet set = kernel_set<Ops, Codes>(name, &kt::kRowsAvx512);
  set.many = Gemm::many;
  set.scratch_bytes = Gemm::scratch_bytes;
  return set;
}
