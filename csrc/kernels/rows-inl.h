// Element-wise work between the GEMMs, compiled once per instruction set beside gemm-inl.h: SwiGLU, the weighted sum of
// expert outputs, conversion of hidden states and outputs. Vectors always start at multiples of kLanes and padding is
// computed like data, so an element meets the same instructions wherever its row stands in a batch.
//
// Ops provides, beyond gemm-inl.h: mul, add, sub, div, fma(a, b, c) = a*b + c, min, max (second operand when one is
// NaN, as the x86 instructions do), round_even(Vec), pow2(Vec integral) and conversions
//   from_bf16 / from_f16(const uint16_t*) -> Vec,  to_bf16 / to_f16(Vec, uint16_t*)

template <class Ops>
struct Rows {
  using Vec = typename Ops::Vec;
  static constexpr int kLanes = Ops::kLanes;

  // exp(x) for |x| <= 140, NaN for NaN: x = n*ln2 + r, |r| <= ln2/2, Taylor polynomial of degree 7 for exp(r)
  // (truncation error |r|^8/8! < 6e-9, below half an ulp), ln2 split in two fp32 parts (Cody and Waite, 1980). 2^n goes
  // in as two factors, so that results beyond the range of fp32 become infinity and zero by themselves.
  static inline __attribute__((always_inline)) Vec exp(Vec x) {
    const Vec n = Ops::round_even(Ops::mul(x, Ops::set(1.44269504088896341f)));
    Vec r = Ops::fma(n, Ops::set(-0.693145751953125f), x);
    r = Ops::fma(n, Ops::set(-1.42860682030941723e-6f), r);
    Vec y = Ops::set(1.0f / 5040);
    y = Ops::fma(y, r, Ops::set(1.0f / 720));
    y = Ops::fma(y, r, Ops::set(1.0f / 120));
    y = Ops::fma(y, r, Ops::set(1.0f / 24));
    y = Ops::fma(y, r, Ops::set(1.0f / 6));
    y = Ops::fma(y, r, Ops::set(0.5f));
    y = Ops::fma(y, r, Ops::set(1.0f));
    y = Ops::fma(y, r, Ops::set(1.0f));
    const Vec half = Ops::round_even(Ops::mul(n, Ops::set(0.5f)));
    return Ops::mul(Ops::mul(y, Ops::pow2(half)), Ops::pow2(Ops::sub(n, half)));
  }

  // x / (1 + exp(-s*x)). The clip keeps 2^n representable; exp is infinite or zero long before.
  static inline __attribute__((always_inline)) Vec times_sigmoid(Vec x, Vec s) {
    Vec t = Ops::mul(x, Ops::sub(Ops::zero(), s));
    t = Ops::max(Ops::set(-140.0f), Ops::min(Ops::set(140.0f), t));
    return Ops::div(x, Ops::add(Ops::set(1.0f), exp(t)));
  }

  static inline __attribute__((always_inline)) Vec clamp(Vec x, float low, float high) {
    return Ops::max(Ops::set(low), Ops::min(Ops::set(high), x));
  }

  static inline __attribute__((always_inline)) Vec gated(Vec gate, Vec up, float limit, float alpha) {
    if (limit > 0) {
      gate = Ops::min(Ops::set(limit), gate);
      up = clamp(up, -limit, limit);
    }
    if (alpha > 0) return Ops::mul(times_sigmoid(gate, Ops::set(alpha)), Ops::add(up, Ops::set(1.0f)));
    return Ops::mul(times_sigmoid(gate, Ops::set(1.0f)), up);
  }

  static void swiglu(const kt::SwigluArgs& s) {
    using Element = typename Ops::Element;
    for (int t = 0; t < s.tokens; ++t) {
      const float* gates = s.gate + t * s.gate_stride;
      const float* ups = s.up + t * s.up_stride;
      Element* h = static_cast<Element*>(s.h) + t * s.h_stride;
      for (int p = 0; p < s.panel_pairs; ++p) {
        for (int i = 0; i < kt::kPanelRows; i += kLanes) {
          const Vec gate = Ops::load(gates + p * s.panel_stride + i);
          const Vec up = Ops::load(ups + p * s.panel_stride + i);
          Ops::store_activation(gated(gate, up, s.limit, s.alpha), h + p * kt::kPanelRows + i);
        }
      }
    }
  }

  static void weighted_sum(const kt::WeightedSumArgs& s) {
    for (int t = 0; t < s.tokens; ++t) {
      const float* c = s.c + t * s.c_stride;
      float* sum = s.sum + s.rows[t] * s.sum_stride;
      const Vec w = Ops::set(s.weights[t]);
      for (int i = 0; i < s.columns; i += kLanes) {
        Ops::store(sum + i, Ops::fma(w, Ops::load(c + i), Ops::load(sum + i)));
      }
    }
  }

  // kFrom/kTo are functions of one vector; the last, partial vector goes through a padded copy.
  template <class From, class To, Vec (*kLoad)(const From*), void (*kStore)(Vec, To*)>
  static void convert(const void* from, void* to, size_t count) {
    const From* f = static_cast<const From*>(from);
    To* t = static_cast<To*>(to);
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) kStore(kLoad(f + i), t + i);
    if (i == count) return;
    From f_tail[kLanes] = {};
    To t_tail[kLanes];
    __builtin_memcpy(f_tail, f + i, (count - i) * sizeof(From));
    kStore(kLoad(f_tail), t_tail);
    __builtin_memcpy(t + i, t_tail, (count - i) * sizeof(To));
  }
};

// What becomes of a number of the hidden states.
template <class Ops>
struct RoundedToBf16 {
  static constexpr int kUnconverted = sizeof(typename Ops::Element) == 2 ? static_cast<int>(kt::DType::kBf16) : -1;
  static void store(typename Ops::Vec v, typename Ops::Element* to) { Ops::store_activation(Ops::round_bf16(v), to); }
};
template <class Ops>
struct Exact {
  static constexpr int kUnconverted = static_cast<int>(kt::DType::kF32);
  static void store(typename Ops::Vec v, typename Ops::Element* to) { Ops::store_activation(v, to); }
};

// One definition of the whole set, so that two instruction sets differ in their Ops and nowhere else.
template <class Ops, class Loaded = RoundedToBf16<Ops>>
constexpr kt::RowKernels make_row_kernels() {
  using R = Rows<Ops>;
  using E = typename Ops::Element;
  return {sizeof(E) == 2 ? kt::Activation::kBf16 : kt::Activation::kF32,
          Loaded::kUnconverted,
          R::swiglu,
          R::weighted_sum,
          {R::template convert<uint16_t, E, Ops::from_bf16, Loaded::store>,
           R::template convert<uint16_t, E, Ops::from_f16, Loaded::store>,
           R::template convert<float, E, Ops::load, Loaded::store>},
          {R::template convert<float, uint16_t, Ops::load, Ops::to_bf16>,
           R::template convert<float, uint16_t, Ops::load, Ops::to_f16>,
           R::template convert<float, float, Ops::load, Ops::store_to>},
          {R::template convert<uint16_t, float, Ops::from_bf16, Ops::store_to>,
           R::template convert<uint16_t, float, Ops::from_f16, Ops::store_to>,
           R::template convert<float, float, Ops::load, Ops::store_to>}};
}
