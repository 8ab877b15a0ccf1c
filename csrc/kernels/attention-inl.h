// One block of keys for rows that share them, and what joins blocks. Included after rows-inl.h and turn-inl.h of the
// instruction set; attention.h says what is computed and in which order.
//
//     keys      kTileKeys at a time are turned around: panel[d][key], fp32, so that a vector holds one d of kLanes
//               keys, and every group of rows passes over the panel
//     scores    [row][key of the block]; then maximum, exponential and sum of each row
//     values    as they are, or, for several groups of rows, widened a few columns at a time: panel[key][column]

// How the cache stores a number. kPairs: two of them are a word of bf16.
template <class Ops>
struct F32Numbers {
  using Element = float;
  static constexpr bool kPairs = false;
  static inline typename Ops::Vec load(const Element* p) { return Ops::load(p); }
};
template <class Ops>
struct Bf16Numbers {
  using Element = uint16_t;
  static constexpr bool kPairs = true;
  static inline typename Ops::Vec load(const Element* p) { return Ops::from_bf16(p); }
};
template <class Ops>
struct F16Numbers {
  using Element = uint16_t;
  static constexpr bool kPairs = false;
  static inline typename Ops::Vec load(const Element* p) { return Ops::from_f16(p); }
};
template <class Ops>
struct E4m3Numbers {
  using Element = uint8_t;
  static constexpr bool kPairs = false;
  static inline typename Ops::Vec load(const Element* p) {
    const typename Ops::Vec small = Ops::from_e4m3(p);
    // What from_e4m3 makes of NaN, 1.875, is the only magnitude whose square overflows here; infinity times 0 is NaN.
    const typename Ops::Vec overflow = Ops::mul(Ops::mul(small, small), Ops::set(1.03e38f));
    return Ops::fma(small, Ops::set(256.0f), Ops::mul(overflow, Ops::zero()));
  }
};

// A vector of what may be fewer elements: the rest are zeros.
template <class Ops, class Numbers>
static inline typename Ops::Vec load_some(const typename Numbers::Element* p, int count) {
  if (count >= Ops::kLanes) return Numbers::load(p);
  typename Numbers::Element padded[Ops::kLanes] = {};
  __builtin_memcpy(padded, p, count * sizeof(padded[0]));
  return Numbers::load(padded);
}

// Queries of a group, times the scale: [d][8].
template <class Ops, class Turn, class Numbers>
static void pack_queries(const void* const* queries, int rows, int dim, float scale, float* to) {
  using Element = typename Numbers::Element;
  constexpr int kLanes = Ops::kLanes;
  const typename Ops::Vec factor = Ops::set(scale);
  for (int d = 0; d < dim; d += kLanes) {
    typename Turn::Words square[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      square[r] = Turn::words(Ops::zero());
      if (r >= rows) continue;
      square[r] =
          Turn::words(Ops::mul(load_some<Ops, Numbers>(static_cast<const Element*>(queries[r]) + d, dim - d), factor));
    }
    Turn::turn(square);
    for (int i = 0; i < kLanes; ++i) Turn::store_eight(to + (d + i) * kt::kRowGroup, square[i]);
  }
}

// What does not depend on the type of the cache.
template <class Ops>
struct Softmax {
  using Vec = typename Ops::Vec;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kSums = kt::kAttentionPad / kLanes;  // vectors that hold a row's 16 sums
  static constexpr float kMinusInfinity = -__builtin_inff();

  // exp(x) for x <= 0; below the clip it is zero long before.
  static inline __attribute__((always_inline)) Vec exp(Vec x) { return Rows<Ops>::exp(Ops::max(Ops::set(-140.0f), x)); }
  static inline float exp(float x) {
    float lanes[kLanes];
    Ops::store(lanes, exp(Ops::set(x)));
    return lanes[0];
  }

  // cap * tanh(x / cap), as 1 - 2 / (exp(2x / cap) + 1): its error is that of fp32 next to cap.
  static void cap_scores(float* scores, int begin, int end, float cap) {
    const Vec factor = Ops::set(2.0f / cap), one = Ops::set(1.0f), limit = Ops::set(cap);
    for (int k = begin; k < end; k += kLanes) {
      Vec x = Ops::mul(Ops::load(scores + k), factor);
      x = Ops::max(Ops::set(-60.0f), Ops::min(Ops::set(60.0f), x));
      const Vec part = Ops::div(Ops::set(2.0f), Ops::add(Rows<Ops>::exp(x), one));
      Ops::store(scores + k, Ops::mul(limit, Ops::sub(one, part)));
    }
  }

  // Gives the keys of [begin, end) that the row does not see the score -infinity. Whether it sees any.
  static bool hide(float* scores, const kt::VisibleKeys& see, int begin, int end) {
    bool any = see.first < see.last;
    for (int k = begin; k < see.first; ++k) scores[k] = kMinusInfinity;
    for (int i = 0; i < see.tree_count; ++i) {
      if (see.tree[i] != 0) {
        any = true;
      } else {
        scores[see.last + i] = kMinusInfinity;
      }
    }
    for (int k = see.end(); k < end; ++k) scores[k] = kMinusInfinity;
    return any;
  }

  // Scores become p; the row's maximum and sum. A NaN among the scores makes the sum NaN.
  static void row(float* scores, const kt::VisibleKeys& see, float cap, float* maximum, float* sum) {
    const int begin = see.first / kt::kAttentionPad * kt::kAttentionPad;
    const int end = static_cast<int>(kt::padded_dim(see.end()));
    *maximum = kMinusInfinity;
    *sum = 0;
    if (cap > 0) cap_scores(scores, begin, end, cap);
    if (!hide(scores, see, begin, end)) return;
    Vec largest = Ops::set(kMinusInfinity);
    for (int k = begin; k < end; k += kLanes) largest = Ops::max(Ops::load(scores + k), largest);
    float lanes[kt::kAttentionPad];
    Ops::store(lanes, largest);
    for (int i = 0; i < kLanes; ++i) *maximum = lanes[i] > *maximum ? lanes[i] : *maximum;

    const Vec m = Ops::set(*maximum);
    Vec sums[kSums];
    for (Vec& s : sums) s = Ops::zero();
    for (int k = begin; k < end; k += kt::kAttentionPad) {
      for (int v = 0; v < kSums; ++v) {
        const Vec p = exp(Ops::sub(Ops::load(scores + k + v * kLanes), m));
        Ops::store(scores + k + v * kLanes, p);
        sums[v] = Ops::add(sums[v], p);
      }
    }
    for (int v = 0; v < kSums; ++v) Ops::store(lanes + v * kLanes, sums[v]);
    for (int half = kt::kAttentionPad / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    *sum = lanes[0];
  }

  static void scale_and_add(float* o, const float* added, float kept, float factor, int count) {
    const Vec a = Ops::set(kept), b = Ops::set(factor);
    for (int d = 0; d < count; d += kLanes) {
      Ops::store(o + d, Ops::fma(Ops::load(added + d), b, Ops::mul(Ops::load(o + d), a)));
    }
  }

  static void merge(const kt::AttentionPartial& total, const kt::AttentionPartial& block, int rows, int value_dim) {
    for (int r = 0; r < rows; ++r) {
      if (block.sum[r] == 0) continue;
      float* o = total.o + r * total.o_stride;
      const float* added = block.o + r * block.o_stride;
      if (total.sum[r] == 0) {
        __builtin_memcpy(o, added, value_dim * sizeof(float));
        total.maximum[r] = block.maximum[r];
        total.sum[r] = block.sum[r];
        continue;
      }
      const float before = total.maximum[r], later = block.maximum[r];
      const float m = later > before ? later : before;
      const float kept = exp(before - m), factor = exp(later - m);
      total.maximum[r] = m;
      total.sum[r] = __builtin_fmaf(block.sum[r], factor, total.sum[r] * kept);
      scale_and_add(o, added, kept, factor, value_dim);
    }
  }

  static void finish(const kt::AttentionPartial& total, int row, const float* sink, float scale, int value_dim,
                     float* out) {
    float sum = total.sum[row], kept = 1;
    if (sink != nullptr && sum != 0) {
      const float before = total.maximum[row];
      const float m = *sink > before ? *sink : before;
      kept = exp(before - m);
      sum = __builtin_fmaf(1.0f, exp(*sink - m), sum * kept);
    }
    const float* o = total.o + row * total.o_stride;
    // A row without a key to see (padding of a batch) is zero.
    const Vec divisor = Ops::set(sum == 0 ? 1.0f : sum), factor = Ops::set(kept), last = Ops::set(sum == 0 ? 0 : scale);
    for (int d = 0; d < value_dim; d += kLanes) {
      Ops::store(out + d, Ops::mul(Ops::div(Ops::mul(Ops::load(o + d), factor), divisor), last));
    }
  }
};

template <class Ops, class Turn, class Numbers>
struct Attention {
  using Vec = typename Ops::Vec;
  using Words = typename Turn::Words;
  using Element = typename Numbers::Element;
  using Block = kt::AttentionBlock;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kTileVecs = 2;
  static constexpr int kTileKeys = kTileVecs * kLanes;
  static constexpr int kSlice = kTileVecs * kLanes;  // columns of values
  static constexpr int kKeysAtOnce = 64;             // of which all slices of values are taken before the next
  // Sums of a tile: 16 of 32 registers, or 8 of 16.
  static constexpr int kTileRows = kLanes == 16 ? 8 : 4;

  // Rows that are needed later, asked for a line at a time while something else is computed: as many requests at once
  // as there are would wait for each other, and the arithmetic behind them.
  struct Ahead {
    const void* const* row;
    const void* const* end;
    int bytes;
    int offset = 0;
    inline __attribute__((always_inline)) void step() {
      if (row == end) return;
      __builtin_prefetch(static_cast<const char*>(*row) + offset, 0, 2);
      offset += 64;
      if (offset < bytes) return;
      offset = 0;
      ++row;
    }
  };
  static constexpr int kLinesAtOnce = sizeof(Element) > 2 ? 2 : 1;

  static Ahead values_of(const Block& b, int k) {
    const int from = k < b.first ? b.first : k, to = k + kTileKeys < b.end ? k + kTileKeys : b.end;
    return {b.values + from, b.values + to, b.value_dim * static_cast<int>(sizeof(Element))};
  }

  using Square = const Element* [kLanes];  // keys that are turned together

  static inline __attribute__((always_inline)) void turn_numbers(const Square& keys, int d, int dim, float* to) {
    Words square[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = Turn::words(load_some<Ops, Numbers>(keys[i] + d, dim - d));
    Turn::turn(square);
    for (int i = 0; i < kLanes; ++i) Ops::store(to + (d + i) * kTileKeys, Turn::vec(square[i]));
  }
  // Columns [d, d + 2 * kLanes), two to a word.
  static inline __attribute__((always_inline)) void turn_pairs(const Square& keys, int d, float* to) {
    Words square[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = Turn::words(static_cast<const void*>(keys[i] + d));
    Turn::turn(square);
    for (int i = 0; i < kLanes; ++i) {
      Ops::store(to + (d + 2 * i) * kTileKeys, Turn::low_bf16(square[i]));
      Ops::store(to + (d + 2 * i + 1) * kTileKeys, Turn::high_bf16(square[i]));
    }
  }
  // Positions that no row sees take another's key; nobody looks at their scores.
  static void turn_keys(const Block& b, int from, float* panel) {
    for (int v = 0; v < kTileVecs; ++v) {
      Square keys;
      for (int i = 0; i < kLanes; ++i) {
        const int k = from + v * kLanes + i;
        keys[i] = static_cast<const Element*>(b.keys[k < b.first ? b.first : k < b.end ? k : b.end - 1]);
      }
      int d = 0;
      if constexpr (Numbers::kPairs) {
        for (; d + 2 * kLanes <= b.dim; d += 2 * kLanes) turn_pairs(keys, d, panel + v * kLanes);
      }
      for (; d < b.dim; d += kLanes) turn_numbers(keys, d, b.dim, panel + v * kLanes);
    }
  }

  template <int kRows>
  static void score_tile(const float* q, int dim, const float* panel, float* scores, Ahead& ahead) {
    Vec sums[kRows][kTileVecs];
    for (auto& row : sums) {
      for (Vec& sum : row) sum = Ops::zero();
    }
    for (int d = 0; d < dim; ++d) {
      for (int i = 0; i < kLinesAtOnce; ++i) ahead.step();
      Vec keys[kTileVecs];
      for (int v = 0; v < kTileVecs; ++v) keys[v] = Ops::load(panel + d * kTileKeys + v * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vec number = Ops::set(q[d * kt::kRowGroup + r]);
        for (int v = 0; v < kTileVecs; ++v) sums[r][v] = Ops::fma(number, keys[v], sums[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kTileVecs; ++v) Ops::store(scores + r * kt::kKeysPerBlock + v * kLanes, sums[r][v]);
    }
  }

  template <int kValue>
  struct Constant {
    static constexpr int value = kValue;
  };

  // Calls f with the number of rows as a type.
  template <int kRows, class F>
  static inline __attribute__((always_inline)) void with_rows(int rows, const F& f) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return with_rows<kRows - 1>(rows, f);
    }
    f(Constant<kRows>());
  }

  // Calls f(first row, rows) for tiles that do not cross groups.
  template <class F>
  static inline void for_tiles(int rows, const F& f) {
    for (int group = 0; group < rows; group += kt::kRowGroup) {
      const int end = group + kt::kRowGroup < rows ? group + kt::kRowGroup : rows;
      for (int row = group; row < end; row += kTileRows) f(row, end - row < kTileRows ? end - row : kTileRows);
    }
  }

  static bool sees_any(const Block& b, int row, int rows, int from) {
    for (int r = row; r < row + rows; ++r) {
      if (b.visible[r].first < from + kTileKeys && b.visible[r].end() > from) return true;
    }
    return false;
  }

  static void score(const Block& b) {
    const size_t group_floats = kt::padded_dim(b.dim) * kt::kRowGroup;
    for (int k = b.first / kTileKeys * kTileKeys; k < b.end; k += kTileKeys) {
      turn_keys(b, k, b.panel);
      Ahead ahead = values_of(b, k);
      for_tiles(b.rows, [&](int row, int rows) {
        if (!sees_any(b, row, rows, k)) return;
        const float* q = b.q + row / kt::kRowGroup * group_floats + row % kt::kRowGroup;
        with_rows<kTileRows>(rows, [&](auto count) {
          score_tile<decltype(count)::value>(q, b.dim, b.panel, b.scores + row * kt::kKeysPerBlock + k, ahead);
        });
      });
    }
  }

  // Where a slice of the values stands, how many keys are multiplied before the next slice, and what is fetched.
  struct InCache {
    const void* const* values;
    int column;
    Ahead& ahead;
    inline Vec load(int k, int v) const {
      return Numbers::load(static_cast<const Element*>(values[k]) + column + v * kLanes);
    }
    inline void step() const {
      for (int i = 0; i < kLinesAtOnce; ++i) ahead.step();
    }
  };
  struct InPanel {
    const float* panel;
    inline Vec load(int k, int v) const { return Ops::load(panel + k * kSlice + v * kLanes); }
    inline void step() const {}
  };

  // o += p * values over keys [from, to), ascending.
  template <int kRows, int kVecs, class Values>
  static inline void add_values(const Values& values, int from, int to, const float* p, float* o, size_t o_stride) {
    Vec sums[kRows][kVecs];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) sums[r][v] = Ops::load(o + r * o_stride + v * kLanes);
    }
    for (int k = from; k < to; ++k) {
      values.step();
      Vec numbers[kVecs];
      for (int v = 0; v < kVecs; ++v) numbers[v] = values.load(k, v);
      for (int r = 0; r < kRows; ++r) {
        const Vec weight = Ops::set(p[r * kt::kKeysPerBlock + k]);
        for (int v = 0; v < kVecs; ++v) sums[r][v] = Ops::fma(weight, numbers[v], sums[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) Ops::store(o + r * o_stride + v * kLanes, sums[r][v]);
    }
  }

  // Keys [first, last).
  struct Keys {
    int first, last;
    Keys within(Keys outer) const {
      return {first > outer.first ? first : outer.first, last < outer.last ? last : outer.last};
    }
    bool any() const { return first < last; }
  };
  // The keys that all rows of a tile see.
  static Keys common_keys(const Block& b, int row, int rows, Keys part) {
    Keys common = part;
    for (int r = row; r < row + rows; ++r) common = common.within({b.visible[r].first, b.visible[r].last});
    return common.any() ? common : Keys{part.first, part.first};
  }

  // Adds the keys of `part` to the rows of a tile: those that all see together, the others row by row, ascending.
  template <int kVecs, class Values>
  static void add_tile(const Block& b, const Values& values, int row, int rows, int column, Keys part) {
    const size_t stride = b.partial.o_stride;
    float* o = b.partial.o + row * stride + column;
    const float* p = b.scores + row * kt::kKeysPerBlock;
    const Keys common = common_keys(b, row, rows, part);
    const auto alone = [&](int r, Keys keys) {
      if (!keys.any()) return;
      add_values<1, kVecs>(values, keys.first, keys.last, p + r * kt::kKeysPerBlock, o + r * stride, stride);
    };
    for (int r = 0; r < rows; ++r) {
      const kt::VisibleKeys& see = b.visible[row + r];
      alone(r, Keys{see.first, see.last}.within({part.first, common.first}));
    }
    if (common.any()) {
      with_rows<kTileRows>(rows, [&](auto count) {
        add_values<decltype(count)::value, kVecs>(values, common.first, common.last, p, o, stride);
      });
    }
    for (int r = 0; r < rows; ++r) {
      const kt::VisibleKeys& see = b.visible[row + r];
      alone(r, Keys{see.first, see.last}.within({common.last, part.last}));
      for (int i = 0; i < see.tree_count; ++i) {
        if (see.tree[i] != 0) alone(r, Keys{see.last + i, see.last + i + 1}.within(part));
      }
    }
  }

  static void widen_slice(const Block& b, int column) {
    for (int k = b.first; k < b.end; ++k) {
      const Element* value = static_cast<const Element*>(b.values[k]) + column;
      for (int v = 0; v < kTileVecs; ++v) {
        const int count = b.value_dim - column - v * kLanes;
        if (count <= 0) break;
        Ops::store(b.panel + k * kSlice + v * kLanes, load_some<Ops, Numbers>(value + v * kLanes, count));
      }
    }
  }

  template <class Values>
  static inline void add_slice(const Block& b, const Values& values, int column, Keys part) {
    for_tiles(b.rows, [&](int row, int rows) {
      if (b.value_dim - column > kLanes) {
        add_tile<2>(b, values, row, rows, column, part);
      } else {
        add_tile<1>(b, values, row, rows, column, part);
      }
    });
  }

  // The values are read once, in the order in which they stand, while the next block's keys arrive.
  static void add_from_cache(const Block& b) {
    Ahead ahead = {b.next_keys, b.next_keys + b.next_count, b.dim * static_cast<int>(sizeof(Element))};
    for (int from = b.first; from < b.end; from += kKeysAtOnce) {
      const Keys part = {from, from + kKeysAtOnce < b.end ? from + kKeysAtOnce : b.end};
      for (int column = 0; column < b.value_dim; column += kSlice) {
        add_slice(b, InCache{b.values, column, ahead}, column, part);
      }
    }
  }

  static void add_from_panel(const Block& b) {
    for (int column = 0; column < b.value_dim; column += kSlice) {
      widen_slice(b, column);
      add_slice(b, InPanel{b.panel}, column, Keys{b.first, b.end});
    }
  }

  static void block(const Block& b) {
    score(b);
    const size_t columns = kt::padded_dim(b.value_dim);
    for (int r = 0; r < b.rows; ++r) {
      Softmax<Ops>::row(b.scores + r * kt::kKeysPerBlock, b.visible[r], b.cap, b.partial.maximum + r,
                        b.partial.sum + r);
      __builtin_memset(b.partial.o + r * b.partial.o_stride, 0, columns * sizeof(float));
    }
    if (b.rows <= kTileRows && b.value_dim % kLanes == 0) {
      add_from_cache(b);
    } else {
      add_from_panel(b);
    }
  }
};

// One definition of the whole set, so that two instruction sets differ in their Ops and nowhere else.
template <class Ops, class Turn>
constexpr kt::AttentionKernels make_attention_kernels() {
  using R = Rows<Ops>;
  return {{Attention<Ops, Turn, F32Numbers<Ops>>::block, Attention<Ops, Turn, Bf16Numbers<Ops>>::block,
           Attention<Ops, Turn, F16Numbers<Ops>>::block, Attention<Ops, Turn, E4m3Numbers<Ops>>::block},
          Softmax<Ops>::merge,
          Softmax<Ops>::finish,
          {pack_queries<Ops, Turn, F32Numbers<Ops>>, pack_queries<Ops, Turn, Bf16Numbers<Ops>>,
           pack_queries<Ops, Turn, F16Numbers<Ops>>},
          {R::template convert<float, float, Ops::load, Ops::store_to>,
           R::template convert<float, uint16_t, Ops::load, Ops::to_bf16>,
           R::template convert<float, uint16_t, Ops::load, Ops::to_f16>}};
}
