// Weights with scales on AMX, any codes: a block of K of one panel becomes B tiles that stay in L1 (or is made of them
// already), and blocks of 32 tokens pass over it. Included behind gemm-inl.h and tile_loop-inl.h, with the `Ops` and
// `Codes` of the AVX512 kernels.
//
// Every sum of columns that share a scale leaves the tiles as it is, exact int32 or fp32, and vectors add it to the
// totals as all other kernels do. Those of some sums are added while the tiles are at the next ones.
//
//   scratch   | what ManyTokens keeps there: decoded weights, the scales of their sums | two times kMostSums sums |
//
// Not measured: there was no CPU with AMX. doc/kernels.md counts the cycles.

// B tiles as codes make them: bytes signed, without the offset of their codes.
template <class Codes, class Products>
struct DecodedTiles {
  using P = Panel<Ops, Codes>;
  static constexpr bool kInPlace = false;
  static constexpr int kVecs = P::kVecs;

  struct Centred {
    __m512i offset;
    explicit Centred(const kt::PanelLayout& layout)
        : offset(_mm512_set1_epi8(static_cast<char>(layout.integer_offset))) {}
    inline __attribute__((always_inline)) __m512i operator()(__m512i weights) const {
      return Ops::kInteger ? _mm512_sub_epi8(weights, offset) : weights;
    }
  };

  // One block of tokens: there is nothing else to do meanwhile, so codes are fetched a little ahead of their decoding.
  static const uint8_t* weights(const kt::GemmArgs& g, const uint8_t* panel, int begin, int count) {
    const typename Codes::Tables tables(*g.layout);
    const Centred centred(*g.layout);
    const bool fetches = g.tokens <= kBlockTokens;
    typename Codes::Cursor chunk = Codes::at(*g.layout, panel, begin);
    uint8_t* out = g.scratch;
    for (int k = 0; k < count; k += Codes::kChunkK, chunk = Codes::next(chunk)) {
      if (fetches) Codes::prefetch(Codes::shifted(chunk, P::kAheadBytes));
      for (int s = 0; s < Codes::kSlices; ++s) {
        typename Codes::Decoded decoded[Codes::kDots][Codes::kOutputs];
        Codes::decode(tables, chunk, s, decoded);
        for (int q = 0; q < Codes::kDots; ++q) {
          for (int j = 0; j < Codes::kOutputs; ++j) {
            _mm512_store_si512(out + (q * kVecs + s * Codes::kOutputs + j) * kLineBytes,
                               centred(P::own(Codes::weights(decoded[q][j]))));
          }
        }
      }
      out += Codes::kDots * kVecs * kLineBytes;
    }
    settle_stores();
    return g.scratch;
  }
};

// Panels that are B tiles as they are.
template <class Codes>
struct TilesInPlace {
  static constexpr bool kInPlace = true;
  static const uint8_t* weights(const kt::GemmArgs& g, const uint8_t* panel, int begin, int) {
    return Codes::at(*g.layout, panel, begin);
  }
};

template <class Codes, class Products, class Tiles>
struct TileGemm {
  using P = Panel<Ops, Codes>;
  using Many = ManyTokens<Ops, Codes>;
  static constexpr int kColumnBytes = Products::kColumnBytes;
  // Sums that are added at once, of 4 KiB each, whole steps of int8 activations. Two, and as many that wait, leave room
  // in L1 for a block of weights; where sums are short, storing totals would cost more than that.
  static constexpr int kMostSums = kt::kLargestInt8StepK / kt::kSmallestStepK;
  static constexpr size_t kSumSize = size_t{kBlockTokens} * kt::kPanelRows;
  static constexpr size_t kSumsBytes = kMostSums * kSumSize * sizeof(float);
  static inline int sums_at_once(const kt::PanelLayout& layout) {
    return P::sum_of(layout) < kt::kLargestInt8StepK ? kMostSums : 2;
  }

  static size_t scratch_bytes(int, int) { return Many::kScratchBytes + 2 * kSumsBytes; }

  // Sums that wait to be added to the totals of some tokens: `first` is the first of them in the call.
  struct Waiting {
    TokenRows<Ops> a = {};
    float* c = nullptr;
    int tokens = 0;
    kt::Store store = kt::Store::kOverwrite;
    const uint8_t* sums = nullptr;
    const float* records = nullptr;
    int first = 0;
    int count = 0;
    int done = 0;  // tokens
  };

  static inline __attribute__((always_inline)) __m512 load_sum(const uint8_t* sums, size_t place) {
    const uint8_t* from = sums + place * sizeof(float);
    if constexpr (Ops::kInteger) {
      return _mm512_cvtepi32_ps(_mm512_load_si512(from));
    } else {
      return _mm512_load_ps(from);
    }
  }

  // The total of 16 rows of a token after the sums that wait.
  template <class Step>
  static inline __attribute__((always_inline)) __m512 added(const kt::GemmArgs& g, const Waiting& w, int t, int row,
                                                            __m512 total) {
    const size_t place = static_cast<size_t>(t) * kt::kPanelRows + row;
    if constexpr (Ops::kInteger) {
      const int per_step = P::step_of(*g.layout) / P::sum_of(*g.layout);
      for (int s = 0; s < w.count; s += per_step) {
        __m512 of_step = Ops::zero();
        for (int i = s; i < s + per_step && i < w.count; ++i) {
          const Step step = Step::from_memory(w.records + i * Step::kFloats, row);
          of_step = step.add(of_step, load_sum(w.sums, i * kSumSize + place), w.a.group(t, w.first + i));
        }
        total = Ops::fma(of_step, Ops::set(w.a.group(t, w.first + s)->scale), total);
      }
    } else {
      for (int i = 0; i < w.count; ++i) {
        const Step step = Step::from_memory(w.records + i * Step::kFloats, row);
        total = step.add(total, load_sum(w.sums, i * kSumSize + place), nullptr);
      }
    }
    return total;
  }

  // Goes on to `end` tokens.
  template <class Step>
  static inline void add_until(const kt::GemmArgs& g, Waiting& w, int end) {
    for (; w.done < end; ++w.done) {
      float* const c = w.c + w.done * g.c_stride;
      for (int row = 0; row < kt::kPanelRows; row += P::kLanes) {
        const __m512 before = w.store == kt::Store::kOverwrite ? Ops::zero() : Ops::load(c + row);
        Ops::store(c + row, added<Step>(g, w, w.done, row, before));
      }
    }
  }

  // One sum of `columns` columns.
  template <bool kBothHalves>
  static inline void multiply(const Operands& operands, int columns, int depth, Ahead ahead, uint8_t* sums) {
    using Block = TileBlock<Products, kBothHalves>;
    Block::zero();
    Block::multiply(operands, columns * kColumnBytes, depth, ahead);
    Block::store(sums, kPanelLine);
  }

  // A block of K of one panel, and what passes over it.
  struct Pass {
    const kt::GemmArgs& g;
    int depth;         // bytes of a row that tiles take at once
    int first, count;  // columns of the call
    const uint8_t* weights;
    const float* records;
    float* columns;  // totals of the panel
    uint8_t* sums;   // two times kMostSums
    kt::Store store;
    int turn = 0;  // which half of the sums is free
    Waiting waiting = {};
  };

  // Columns of sum `s` of the block.
  static inline int columns_of(const Pass& pass, int s) {
    const int sum_k = P::sum_of(*pass.g.layout);
    return pass.count - s * sum_k < sum_k ? pass.count - s * sum_k : sum_k;
  }

  // `now` sums of up to kBlockTokens tokens from `token` on, from sum `s` on, while those before are added.
  template <class Step>
  static void sums_of(Pass& pass, int token, int tokens, int s, int now) {
    const kt::GemmArgs& g = pass.g;
    const int sum_k = P::sum_of(*g.layout);
    Waiting& waiting = pass.waiting;
    uint8_t* const sums = pass.sums + pass.turn * kSumsBytes;
    const uint8_t* const rows = g.a.data + token * g.a.stride + pass.first * kColumnBytes;
    const uint8_t* const next_rows = rows + kBlockTokens * g.a.stride;
    const int rows_ahead = g.tokens > kBlockTokens ? tokens : 0;
    // Of a sum shorter than a line of A, its own share.
    const int of_a_step = sum_k * kColumnBytes < kLineBytes ? sum_k * kColumnBytes : kLineBytes;
    const int lines = Tiles::kInPlace && token == 0 ? kStepLines * of_a_step / kLineBytes : 0;
    for (int i = 0; i < now; ++i) {
      const int k = (s + i) * sum_k, columns = columns_of(pass, s + i);
      const uint8_t* const w = pass.weights + static_cast<size_t>(k) * kColumnBytes * (kPanelLine / 4);
      const Operands operands = {rows + k * kColumnBytes, g.a.stride, w};
      const int rows_now = k * kColumnBytes % kLineBytes == 0 ? rows_ahead : 0;
      const Ahead ahead = {w + kAheadBytes, lines, rows_now, (pass.count - k) * kColumnBytes, next_rows};
      uint8_t* const to = sums + i * kSumSize * sizeof(float);
      if (tokens > kTileRows) {
        multiply<true>(operands, columns, pass.depth, ahead, to);
      } else {
        multiply<false>(operands, columns, pass.depth, ahead, to);
      }
      add_until<Step>(g, waiting, waiting.tokens * (i + 1) / now);
    }
    waiting = {{g.a.data + token * g.a.stride, g.a.groups + token * g.a.stride, g.a.stride},
               pass.columns + token * g.c_stride,
               tokens,
               s == 0 ? pass.store : kt::Store::kAccumulate,
               sums,
               pass.records + s * Step::kFloats,
               pass.first / sum_k + s,
               now,
               0};
    pass.turn ^= 1;
  }

  // The codes of the next block, as many as this one's, fetched while tokens pass over this one.
  static typename Many::Fetch next_codes(const kt::GemmArgs& g, const uint8_t* panel, int begin, int count) {
    if (Tiles::kInPlace || g.tokens <= kBlockTokens) return {};
    return {Codes::shifted(Codes::at(*g.layout, panel, begin), Many::kBlockCodeBytes), count / Codes::kChunkK};
  }

  template <class Step>
  static int tokens_over(Pass& pass, typename Many::Fetch next, int configured) {
    const kt::GemmArgs& g = pass.g;
    const int sum_k = P::sum_of(*g.layout), sums = (pass.count + sum_k - 1) / sum_k;
    const int at_once = sums_at_once(*g.layout);
    for (int token = 0; token < g.tokens; token += kBlockTokens) {
      const int tokens = g.tokens - token < kBlockTokens ? g.tokens - token : kBlockTokens;
      if (next.chunks > 0) Many::fetch(next, (g.tokens - token + kBlockTokens - 1) / kBlockTokens);
      configured = configure(configured, tokens, pass.depth);
      for (int s = 0; s < sums; s += at_once) {
        sums_of<Step>(pass, token, tokens, s, sums - s < at_once ? sums - s : at_once);
      }
    }
    add_until<Step>(g, pass.waiting, pass.waiting.tokens);
    return configured;
  }

  template <class Scales>
  static void run(const kt::GemmArgs& g, Scales) {
    using Step = typename Scales::Step;
    const int sum_bytes = P::sum_of(*g.layout) * kColumnBytes;
    const int full = sum_bytes < kLineBytes ? sum_bytes : kLineBytes;
    // K that ends within a sum: in half sums.
    const int depth = g.k_count * kColumnBytes % full == 0 ? full : kt::kPanelK * kColumnBytes;
    float* const records = reinterpret_cast<float*>(g.scratch + Many::kDecodedBytes);
    int configured = 0;
    for (int p = 0; p < g.panel_count; ++p) {
      const uint8_t* const panel = P::panel_at(g, p);
      for (int k = 0; k < g.k_count; k += Many::kBlockK) {
        const int count = g.k_count - k < Many::kBlockK ? g.k_count - k : Many::kBlockK;
        Many::template decode_scales<Scales>(g, panel, g.first_k + k, count, records);
        Pass pass = {g,
                     depth,
                     k,
                     count,
                     Tiles::weights(g, panel, g.first_k + k, count),
                     records,
                     P::columns_of(g, p),
                     g.scratch + Many::kScratchBytes,
                     k == 0 ? g.store : kt::Store::kAccumulate};
        configured = tokens_over<Step>(pass, next_codes(g, panel, g.first_k + k, count), configured);
      }
    }
    _tile_release();
  }

  static void any(const kt::GemmArgs& g) {
    Codes::ScaleTypes::template call<Ops>(g.layout->scale_type, [&](auto scales) { run(g, scales); });
    P::spread_nan(g);
  }
};

// Int8 activations: few tokens by AVX512-VNNI, whose sums are the same integers.
template <class Codes, class Tiles = DecodedTiles<Codes, Int8Products>>
constexpr kt::KernelSet integer_tile_set(const char* name) {
  using Gemm = TileGemm<Codes, Int8Products, Tiles>;
  kt::KernelSet set = kernel_set<Ops, Codes>(name, &kt::kRowsAvx512);
  set.many = Gemm::any;
  set.few_calls = 1;
  set.scratch_bytes = Gemm::scratch_bytes;
  return set;
}

// bf16 activations: any number of tokens by tiles, because TDPBF16PS adds in an order of its own.
template <class Codes>
constexpr kt::KernelSet bf16_tile_set(const char* name) {
  using Gemm = TileGemm<Codes, Bf16Products, DecodedTiles<Codes, Bf16Products>>;
  return {name,          Ops::kActivation,    0,       Gemm::any,           Gemm::any,
          kt::kBlocking, Gemm::scratch_bytes, nullptr, &kt::kRowsAvx512Bf16};
}
