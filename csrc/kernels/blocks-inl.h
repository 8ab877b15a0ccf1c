// Rows as a GGUF file has them, of any type: decoded block by block to fp32 and multiplied by fp32 activations.
// Included after gemm-inl.h (with what that needs), formats/gguf/block_types-inl.h and the quads-inl.h of the
// instruction set.
//
// A panel is 32 rows of PanelLayout::block_row_bytes each, one behind the other, at any address:
//
//   row 0:  | block of columns 0.. | block | ... |  PanelLayout::k columns, nothing is read beyond
//   row 1:  | ...
//   row 31: | ...
//
// 256 columns of all rows at a time are read as small integers, scales and lows: read() of the type. Then four columns
// of Ops::kLanes rows change places, so that a vector holds one column of them, times scale plus low: the exact number
// of the format. From there on it is a format without scales (kernel_set.h): one ascending sum for each element.

// 256 columns of a panel.
struct BlockRows {
  static constexpr int kColumns = kt::kLargestBlock;
  static constexpr int kGroups = kt::kLargestBlockGroups;
  int8_t codes[kt::kPanelRows][kColumns];
  float scale[kGroups][kt::kPanelRows];
  float low[kGroups][kt::kPanelRows];
};

// Where 256 columns of a panel stand.
struct BlockSource {
  const uint8_t* first;  // block of row 0
  size_t row_bytes;
  int columns;          // that exist from here on
  const uint8_t* next;  // what is read next, likely: fetched meanwhile
};

// Asks for the lines of the row of `next` that is `row` rows below the first.
template <int kBytes>
static inline void fetch_block(const BlockSource& source, int row) {
  const uint8_t* next = source.next + row * source.row_bytes;
  for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(next + line, 0, 3);
  __builtin_prefetch(next + kBytes - 1, 0, 3);
}

// Reading types of codes.
template <class T>
struct CodesOf {
  static constexpr int kBlocks = BlockRows::kColumns / T::kColumns;  // of a row
  static constexpr int kGroups = T::kColumns / T::kGroup;            // of a block

  // Block b of a row.
  static inline __attribute__((always_inline)) void read_block(const uint8_t* block, int b, int row, BlockRows& rows) {
    float scale[kGroups];
    float low[kGroups];
    T::read(block, rows.codes[row] + b * T::kColumns, scale, low);
    for (int g = 0; g < kGroups; ++g) {
      rows.scale[b * kGroups + g][row] = scale[g];
      if constexpr (T::kLow) rows.low[b * kGroups + g][row] = low[g];
    }
  }
  static void clear_block(int b, int row, BlockRows& rows) {
    memset(rows.codes[row] + b * T::kColumns, 0, T::kColumns);
    for (int g = 0; g < kGroups; ++g) rows.scale[b * kGroups + g][row] = rows.low[b * kGroups + g][row] = 0;
  }

  // Columns that are missing become zero.
  static void read(const BlockSource& source, BlockRows& rows) {
    const int blocks = source.columns / T::kColumns;
    for (int row = 0; row < kt::kPanelRows; ++row) {
      const uint8_t* from = source.first + row * source.row_bytes;
      fetch_block<kBlocks * T::kBytes>(source, row);
      if (blocks >= kBlocks) {
        for (int b = 0; b < kBlocks; ++b) read_block(from + b * T::kBytes, b, row, rows);
      } else {
        for (int b = 0; b < blocks; ++b) read_block(from + b * T::kBytes, b, row, rows);
        for (int b = blocks; b < kBlocks; ++b) clear_block(b, row, rows);
      }
    }
  }
};

// What the GEMM needs to know of a type of codes.
struct CodesReader {
  int id;
  int group;
  bool low;
  void (*read)(const BlockSource&, BlockRows&);
};
template <class... Types>
static inline const CodesReader* codes_reader(int id, TypeList<Types...>) {
  static constexpr CodesReader kReaders[] = {{Types::kId, Types::kGroup, Types::kLow, CodesOf<Types>::read}...};
  for (const CodesReader& reader : kReaders) {
    if (reader.id == id) return &reader;
  }
  return nullptr;
}

// For Panel and ManyTokens, which see decoded weights alone.
struct CodesBlocks {
  static constexpr bool kScaled = false;
  static constexpr int kChunkK = kt::kPanelK, kChunkBytes = kt::kPanelRows * kt::kPanelK;
  struct Tables {
    explicit Tables(const kt::PanelLayout&) {}
  };
  using Cursor = const uint8_t*;
  static inline Cursor next(Cursor chunk) { return chunk; }
  static inline void prefetch(Cursor) {}
};

// Tiles of one column at a time instead of pairs: on AVX2 12 sums, the weights of a pair and an activation are a
// register too many. (Zen 4, 64 tokens, one thread, 2026-11-30: Q4_K 58 % of the peak by pairs, 80 % so.)
template <class Ops>
struct ByColumn : Ops {
  using Weights = typename Ops::Vec;
  static constexpr int kDotK = 1;
  static constexpr bool kByColumn = false;
  static inline Weights load_weights(const uint8_t* p) { return Ops::load(reinterpret_cast<const float*>(p)); }
  static inline typename Ops::Vec dot(typename Ops::Vec acc, Weights w, const float* a) {
    return Ops::fma(w, Ops::set(a[0]), acc);
  }
};

template <class Ops>
struct BlocksGemm {
  using Many = ManyTokens<ByColumn<Ops>, CodesBlocks>;
  using P = Panel<Ops, CodesBlocks>;
  using Vec = typename Ops::Vec;
  using Pairs = typename Ops::Pairs;
  using Weights = typename Ops::Weights;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kVecs = kt::kPanelRows / kLanes;
  static constexpr int kBlockK = BlockRows::kColumns;
  static constexpr int kHalfK = Many::kBlockK;  // columns of decoded weights
  static constexpr int kQuadK = 16;             // columns of four vectors of codes

  struct alignas(64) Scratch {
    float weights[kHalfK][kt::kPanelRows];
    BlockRows rows;
  };

  // Columns of the call that one block of columns has.
  struct Part {
    int begin;  // of the matrix
    int end;
  };

  static size_t scratch_bytes(int, int) { return sizeof(Scratch); }

  // Columns k .. k + 15 of vector v of rows, as use(column in the block, Weights), ascending by pairs.
  template <bool kLow, class Use>
  static inline __attribute__((always_inline)) void quad(const BlockRows& rows, int k, int v, Vec scale, Vec low,
                                                         Use use) {
    Pairs words[4];
    load_quads(rows.codes[v * kLanes] + k, kBlockK, words);
    const auto number = [&](Vec code) __attribute__((always_inline)) {
      if constexpr (kLow) return Ops::fma(code, scale, low);
      return Ops::mul(code, scale);
    };
    const auto pair = [&](int column, Weights codes) __attribute__((always_inline)) {
      use(column, Weights{number(codes.even), number(codes.odd)});
    };
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      pair(k + 4 * j, Ops::template from_int8<0>(words[j]));
      pair(k + 4 * j + 2, Ops::template from_int8<2>(words[j]));
    }
  }

  // ---- few tokens: numbers stay in registers

  template <int kTokens, int kGroup, bool kLow>
  static inline __attribute__((always_inline)) void few_block(const kt::GemmArgs& g, const BlockRows& rows, int first,
                                                              Part part, Vec (&total)[kTokens][kVecs]) {
    const TokenRows<Ops> a = {g.a.data, g.a.groups, g.a.stride};
    const int at = first - g.first_k;  // column of the call that the block begins at
    for (int k = part.begin - first; k < part.end - first; k += kQuadK) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const Vec scale = Ops::load(rows.scale[k / kGroup] + v * kLanes);
        const Vec low = kLow ? Ops::load(rows.low[k / kGroup] + v * kLanes) : Ops::zero();
        quad<kLow>(rows, k, v, scale, low, [&](int column, const Weights& w) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int t = 0; t < kTokens; ++t) total[t][v] = Ops::dot(total[t][v], w, a.at(t, at + column));
        });
      }
    }
  }

  template <int kTokens, int kGroup, bool kLow>
  static void few_tokens(const kt::GemmArgs& g, const CodesReader& reader) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(g.scratch);
    for (int p = 0; p < g.panel_count; ++p) {
      float* c = P::columns_of(g, p);
      Vec total[kTokens][kVecs];
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kVecs; ++v) {
          total[t][v] = g.store == kt::Store::kAccumulate ? Ops::load(c + t * g.c_stride + v * kLanes) : Ops::zero();
        }
      }
      for_blocks(g, p, kBlockK, [&](const BlockSource& source, int first, Part part) {
        reader.read(source, scratch.rows);
        few_block<kTokens, kGroup, kLow>(g, scratch.rows, first, part, total);
      });
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kVecs; ++v) Ops::store(c + t * g.c_stride + v * kLanes, total[t][v]);
      }
    }
  }

  // ---- many tokens: numbers of half a block in scratch

  // Vector v of rows, columns `column` of the half and the next.
  static inline __attribute__((always_inline)) void keep(Scratch& scratch, int column, int v, const Weights& w) {
    Ops::store(scratch.weights[column] + v * kLanes, w.even);
    Ops::store(scratch.weights[column + 1] + v * kLanes, w.odd);
  }

  template <int kGroup, bool kLow>
  static void widen(Scratch& scratch, int begin, int count) {
    for (int k = begin; k < begin + count; k += kQuadK) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const Vec scale = Ops::load(scratch.rows.scale[k / kGroup] + v * kLanes);
        const Vec low = kLow ? Ops::load(scratch.rows.low[k / kGroup] + v * kLanes) : Ops::zero();
        quad<kLow>(scratch.rows, k, v, scale, low, [&](int column, const Weights& w) __attribute__((always_inline)) {
          keep(scratch, column - begin, v, w);
        });
      }
    }
  }

  // Tiles of all tokens over the decoded columns of `part`.
  static void multiply(const kt::GemmArgs& g, const Scratch& scratch, int p, Part part) {
    const kt::Store store = part.begin == g.first_k ? g.store : kt::Store::kAccumulate;
    const uint8_t* weights = reinterpret_cast<const uint8_t*>(scratch.weights);
    Many::template tiles<ScaledStep<ByColumn<Ops>>>(
        g, {weights, nullptr, part.begin - g.first_k, part.end - part.begin, {}}, P::columns_of(g, p), store);
  }

  template <int kGroup, bool kLow>
  static void many_tokens(const kt::GemmArgs& g, const CodesReader& reader) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(g.scratch);
    for (int p = 0; p < g.panel_count; ++p) {
      for_blocks(g, p, kBlockK, [&](const BlockSource& source, int first, Part part) {
        reader.read(source, scratch.rows);
        for (int k = part.begin; k < part.end; k += kHalfK) {
          const Part half = {k, k + kHalfK < part.end ? k + kHalfK : part.end};
          widen<kGroup, kLow>(scratch, half.begin - first, half.end - half.begin);
          multiply(g, scratch, p, half);
        }
      });
    }
  }

  // Sixteen columns of vector v of rows, from column `k` of the source on; missing ones are zero.
  template <class T>
  static inline void read_numbers(const BlockSource& source, int k, int v, float (&numbers)[kLanes][kQuadK]) {
    const int count = source.columns - k < kQuadK ? source.columns - k : kQuadK;
    for (int r = 0; r < kLanes; ++r) {
      const uint8_t* from = source.first + (v * kLanes + r) * source.row_bytes + k * T::kBytes;
      if (count == kQuadK) {
        T::numbers(from, kQuadK, numbers[r]);
      } else {
        memset(numbers[r], 0, sizeof(numbers[r]));
        if (count > 0) T::numbers(from, count, numbers[r]);
      }
    }
  }

  template <class T>
  static void numbers(const kt::GemmArgs& g) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(g.scratch);
    for (int p = 0; p < g.panel_count; ++p) {
      for_blocks(g, p, kHalfK, [&](const BlockSource& source, int, Part part) {
        for (int row = 0; row < kt::kPanelRows; ++row) fetch_block<kHalfK * T::kBytes>(source, row);
        for (int k = 0; k < part.end - part.begin; k += kQuadK) {
          for (int v = 0; v < kVecs; ++v) {
            alignas(64) float sixteen[kLanes][kQuadK];
            read_numbers<T>(source, k, v, sixteen);
            for (int j = 0; j < kQuadK; j += 4) {
              Pairs columns[4];
              load_quads(&sixteen[0][j], sizeof(sixteen[0]), columns);
              keep(scratch, k + j, v, {(Vec)columns[0], (Vec)columns[1]});
              keep(scratch, k + j + 2, v, {(Vec)columns[2], (Vec)columns[3]});
            }
          }
        }
        multiply(g, scratch, p, part);
      });
    }
  }

  // Calls use(source, first column, part) for the blocks of `step` columns that the call's columns of panel p lie in.
  template <class UseBlock>
  static inline __attribute__((always_inline)) void for_blocks(const kt::GemmArgs& g, int p, int step, UseBlock use) {
    const kt::PanelLayout& layout = *g.layout;
    const uint8_t* panel = P::panel_at(g, p);
    const uint8_t* following = p + 1 < g.panel_count ? P::panel_at(g, p + 1) : g.next_panels;
    const int end = g.first_k + g.k_count;
    const auto at = [&](const uint8_t* rows, int k) {
      return rows + static_cast<size_t>(k / layout.block_k) * layout.block_bytes;
    };
    for (int first = g.first_k / step * step; first < end; first += step) {
      const uint8_t* next = first + step < end ? at(panel, first + step) : at(following, g.first_k / step * step);
      const Part part = {first < g.first_k ? g.first_k : first, first + step < end ? first + step : end};
      use(BlockSource{at(panel, first), layout.block_row_bytes, layout.k - first, next}, first, part);
    }
  }

  template <int kGroup, bool kLow, int kMost>
  static void few_of(const kt::GemmArgs& g, const CodesReader& reader) {
    if (g.tokens == kMost) {
      few_tokens<kMost, kGroup, kLow>(g, reader);
    } else if constexpr (kMost > 1) {
      few_of<kGroup, kLow, kMost - 1>(g, reader);
    }
  }

  // Calls use(group, low) with the numbers of the type's record as types.
  template <class Use>
  static void with(const CodesReader& reader, Use use) {
    const auto low = [&](auto group) { reader.low ? use(group, Constant<true>()) : use(group, Constant<false>()); };
    reader.group == 16 ? low(Constant<16>()) : low(Constant<32>());
  }
  template <auto kValue>
  struct Constant {
    static constexpr auto value = kValue;
  };

  template <class... Types>
  static void numbers_of(const kt::GemmArgs& g, TypeList<Types...>) {
    ((Types::kId == g.layout->block_type && (numbers<Types>(g), true)) || ...);
  }

  static void few(const kt::GemmArgs& g) {
    const CodesReader* reader = codes_reader(g.layout->block_type, CodeTypes());
    if (reader == nullptr) return numbers_of(g, NumberTypes());
    with(*reader, [&](auto group, auto low) { few_of<group.value, low.value, Ops::kFewTokens>(g, *reader); });
  }

  static void many(const kt::GemmArgs& g) {
    const CodesReader* reader = codes_reader(g.layout->block_type, CodeTypes());
    if (reader == nullptr) return numbers_of(g, NumberTypes());
    with(*reader, [&](auto group, auto low) { many_tokens<group.value, low.value>(g, *reader); });
  }
};

// Calls begin at whole blocks, so that none is read twice.
constexpr kt::Blocking kWholeBlocks = {kt::kBlocking.rows, kt::kBlocking.bytes, kt::kBlocking.min_k, kt::kLargestBlock};

template <class Ops>
constexpr kt::KernelSet blocks_kernel_set(const char* name, const kt::RowKernels* rows) {
  using Gemm = BlocksGemm<Ops>;
  return {name,         Ops::kActivation,    Ops::kFewTokens, Gemm::few, Gemm::many,
          kWholeBlocks, Gemm::scratch_bytes, nullptr,         rows};
}
