// The kernels of training.h but for decoding, compiled once per instruction set after rows-inl.h, whose exponential
// they use, with `Ops` that have keep_equal(x, y, value), value where x = y and 0 elsewhere.

// Products of some rows with the few rows of a LoRA's matrix.
template <class Ops>
struct LowRank {
  using Vec = typename Ops::Vec;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kVecs = kt::kPanelRows / kLanes;  // of the columns that one step takes

  // The lanes of a vector added up as a binary tree.
  static inline __attribute__((always_inline)) float sum_of_lanes(Vec v) {
    float lanes[kLanes];
    Ops::store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }

  template <int kRows, int kRank>
  static inline void dot_tile(const kt::DotRowsArgs& d, int row, int rank) {
    Vec sums[kRows][kRank];
    for (auto& of_row : sums) {
      for (Vec& sum : of_row) sum = Ops::zero();
    }
    const float* x = d.x + row * d.x_stride;
    const float* a = d.a + rank * d.a_stride;
    for (int c = 0; c < d.columns; c += kLanes) {
      Vec factors[kRank];
      for (int j = 0; j < kRank; ++j) factors[j] = Ops::load(a + j * d.a_stride + c);
      for (int i = 0; i < kRows; ++i) {
        const Vec value = Ops::load(x + i * d.x_stride + c);
        for (int j = 0; j < kRank; ++j) sums[i][j] = Ops::fma(value, factors[j], sums[i][j]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kRank; ++j) {
        d.out[(row + i) * d.out_stride + rank + j] = d.scale * sum_of_lanes(sums[i][j]);
      }
    }
  }

  template <int kRank>
  static inline void dot_column(const kt::DotRowsArgs& d, int rank) {
    // 2 x 4 sums and 5 operands fit the 16 registers of AVX2.
    constexpr int kRows = kLanes == 16 ? 4 : 2;
    int row = 0;
    for (; row + kRows <= d.rows; row += kRows) dot_tile<kRows, kRank>(d, row, rank);
    for (; row < d.rows; ++row) dot_tile<1, kRank>(d, row, rank);
  }

  static void dot_rows(const kt::DotRowsArgs& d) {
    int rank = 0;
    for (; rank + 4 <= d.rank; rank += 4) dot_column<4>(d, rank);
    for (; rank < d.rank; ++rank) dot_column<1>(d, rank);
  }

  template <int kRows>
  static inline void outer_tile(const kt::AddOuterArgs& o, int row) {
    const float* left = o.left + row * o.left_row;
    for (int c = 0; c < o.columns; c += kt::kPanelRows / 2) {
      constexpr int kHalf = kVecs / 2;
      float* out = o.out + row * o.out_stride + c;
      Vec sums[kRows][kHalf];
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kHalf; ++v) sums[i][v] = Ops::load(out + i * o.out_stride + v * kLanes);
      }
      for (int l = 0; l < o.depth; ++l) {
        Vec right[kHalf];
        for (int v = 0; v < kHalf; ++v) right[v] = Ops::load(o.right + l * o.right_stride + c + v * kLanes);
        for (int i = 0; i < kRows; ++i) {
          const Vec factor = Ops::set(left[i * o.left_row + l * o.left_column]);
          for (int v = 0; v < kHalf; ++v) sums[i][v] = Ops::fma(factor, right[v], sums[i][v]);
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kHalf; ++v) Ops::store(out + i * o.out_stride + v * kLanes, sums[i][v]);
      }
    }
  }

  static void add_outer(const kt::AddOuterArgs& o) {
    // 12 sums a tile on AVX2, 8 on AVX512.
    constexpr int kRows = kLanes == 16 ? 8 : 6;
    int row = 0;
    for (; row + kRows <= o.rows; row += kRows) outer_tile<kRows>(o, row);
    for (; row + 2 <= o.rows; row += 2) outer_tile<2>(o, row);
    for (; row < o.rows; ++row) outer_tile<1>(o, row);
  }
};

template <class Ops>
struct SwigluBackward {
  using R = Rows<Ops>;
  using Vec = typename Ops::Vec;
  static constexpr int kLanes = Ops::kLanes;

  // act and its two derivatives.
  struct Gated {
    Vec h, by_gate, by_up;
  };

  // g s with s = sigmoid(a g), whose derivative is s + a g s (1 - s), times what stands beside it. The clip keeps 2^n
  // representable, as in times_sigmoid.
  static inline __attribute__((always_inline)) Gated gated(Vec gate, Vec up, float alpha) {
    const Vec one = Ops::set(1.0f);
    const Vec factor = Ops::set(alpha > 0 ? alpha : 1.0f);
    const Vec scaled = R::clamp(Ops::mul(gate, factor), -140.0f, 140.0f);
    const Vec s = Ops::div(one, Ops::add(one, R::exp(Ops::sub(Ops::zero(), scaled))));
    const Vec beside = alpha > 0 ? Ops::add(up, one) : up;
    const Vec act = Ops::mul(gate, s);
    const Vec slope = Ops::fma(Ops::mul(scaled, s), Ops::sub(one, s), s);
    return {Ops::mul(act, beside), Ops::mul(slope, beside), act};
  }

  static void run(const kt::SwigluBackwardArgs& s) {
    const Vec weight = Ops::set(s.weight);
    for (int p = 0; p < s.columns / kt::kPanelRows; ++p) {
      Vec sum = Ops::zero();
      for (int i = p * kt::kPanelRows; i < (p + 1) * kt::kPanelRows; i += kLanes) {
        const Vec dh = Ops::load(s.dh + i);
        const Vec gate = Ops::load(s.gate + i);
        const Vec up = Ops::load(s.up + i);
        const Vec clamped_gate = s.limit > 0 ? Ops::min(Ops::set(s.limit), gate) : gate;
        const Vec clamped_up = s.limit > 0 ? R::clamp(up, -s.limit, s.limit) : up;
        const Gated g = gated(clamped_gate, clamped_up, s.alpha);
        sum = Ops::fma(dh, g.h, sum);
        const Vec weighted = Ops::mul(weight, dh);
        Vec dgate = Ops::mul(weighted, g.by_gate);
        Vec dup = Ops::mul(weighted, g.by_up);
        if (s.limit > 0) {
          dgate = Ops::keep_equal(gate, clamped_gate, dgate);
          dup = Ops::keep_equal(up, clamped_up, dup);
        }
        Ops::store(s.dgate + i, dgate);
        Ops::store(s.dup + i, dup);
        Ops::store(s.h + i, g.h);
      }
      s.sums[p] = LowRank<Ops>::sum_of_lanes(sum);
    }
  }
};

// One definition of the whole set, so that two instruction sets differ in their Ops and nowhere else.
template <class Ops>
constexpr kt::TrainingKernels make_training_kernels() {
  return {LowRank<Ops>::dot_rows, LowRank<Ops>::add_outer, SwigluBackward<Ops>::run};
}
