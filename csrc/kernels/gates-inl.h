// Gated activations (gates.h), compiled once per instruction set after elements-inl.h and rows-inl.h (exp). Rounded
// once, after the product.

template <class Ops>
struct Gates {
  using All = Elements<Ops>;
  using Vec = typename Ops::Vec;

  struct Silu {
    static inline Vec of(Vec x) { return Rows<Ops>::times_sigmoid(x, Ops::set(1.0f)); }
  };

  // x/2 * (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3).
  struct GeluTanh {
    static inline Vec of(Vec x) {
      const Vec inner = Ops::fma(Ops::mul(x, x), Ops::set(0.044715f), Ops::set(1.0f));
      return Rows<Ops>::times_sigmoid(x, Ops::mul(Ops::set(1.5957691216057308f), inner));
    }
  };

  // x/2 * erfc(-x/sqrt(2)) with erfc(z) = t * exp(-z^2 + P(t)) for z >= 0, t = 1/(1 + z/2): the Chebyshev fit of
  // Numerical Recipes (erfcc), relative error below 1.2e-7 of erfc, so that small results keep their digits.
  struct Gelu {
    static inline Vec of(Vec x) {
      const Vec negative = Ops::sub(Ops::zero(), x);
      const Vec z = Ops::mul(Ops::max(x, negative), Ops::set(0.70710678118654752f));
      const Vec t = Ops::div(Ops::set(1.0f), Ops::fma(z, Ops::set(0.5f), Ops::set(1.0f)));
      Vec p = Ops::set(0.17087277f);
      p = Ops::fma(p, t, Ops::set(-0.82215223f));
      p = Ops::fma(p, t, Ops::set(1.48851587f));
      p = Ops::fma(p, t, Ops::set(-1.13520398f));
      p = Ops::fma(p, t, Ops::set(0.27886807f));
      p = Ops::fma(p, t, Ops::set(-0.18628806f));
      p = Ops::fma(p, t, Ops::set(0.09678418f));
      p = Ops::fma(p, t, Ops::set(0.37409196f));
      p = Ops::fma(p, t, Ops::set(1.00002368f));
      p = Ops::fma(p, t, Ops::set(-1.26551223f));
      p = Ops::sub(p, Ops::mul(z, z));
      const Vec tail = Ops::mul(t, Rows<Ops>::exp(Ops::max(Ops::set(-140.0f), p)));  // erfc(|x| / sqrt(2))
      // max(x, 0) - |x|/2 * erfc: for x > 0 that is x - x/2 * erfc, for x < 0 x/2 * erfc.
      const Vec half = Ops::mul(Ops::max(x, negative), Ops::set(0.5f));
      return Ops::sub(Ops::max(Ops::zero(), x), Ops::mul(half, tail));
    }
  };

  // 1 / (1 + exp(-x))
  static inline Vec sigmoid_of(Vec x) {
    Vec t = Ops::sub(Ops::zero(), x);
    t = Ops::max(Ops::set(-140.0f), Ops::min(Ops::set(140.0f), t));
    return Ops::div(Ops::set(1.0f), Ops::add(Ops::set(1.0f), Rows<Ops>::exp(t)));
  }
  struct Sigmoid {
    static inline Vec of(Vec x) { return sigmoid_of(x); }
  };

  template <class X, class Act>
  static void gated(const kt::GateArgs& a) {
    const auto* gate = static_cast<const typename X::Stored*>(a.gate);
    const auto* up = static_cast<const typename X::Stored*>(a.up);
    auto* y = static_cast<typename X::Stored*>(a.y);
    All::for_vectors(a.columns, [&](int i, auto extent) {
      const Vec activated = Act::of(load<X>(gate + i, extent));
      store<X>(Ops::mul(activated, load<X>(up + i, extent)), y + i, extent);
    });
  }

  template <class X>
  static void row_sigmoid(const kt::RowGateArgs& a) {
    const auto* up = static_cast<const typename X::Stored*>(a.up);
    auto* y = static_cast<typename X::Stored*>(a.y);
    const Vec gate = sigmoid_of(Ops::set(a.logit));
    All::for_vectors(a.columns,
                     [&](int i, auto extent) { store<X>(Ops::mul(gate, load<X>(up + i, extent)), y + i, extent); });
  }

  template <class X>
  static void add_scaled(const kt::AddScaledArgs& a) {
    const auto* x = static_cast<const typename X::Stored*>(a.x);
    auto* y = static_cast<typename X::Stored*>(a.y);
    const Vec factor = Ops::set(a.factor);
    All::for_vectors(a.columns, [&](int i, auto extent) {
      const Vec scaled = X::round(Ops::mul(load<X>(x + i, extent), factor));
      store<X>(Ops::add(load<X>(y + i, extent), scaled), y + i, extent);
    });
  }
};

template <class Ops>
constexpr kt::GateKernels make_gate_kernels() {
  using G = Gates<Ops>;
  using F = AsF32<Ops>;
  using B = AsBf16<Ops>;
  using H = AsF16<Ops>;
  using Silu = typename G::Silu;
  using Gelu = typename G::Gelu;
  using GeluTanh = typename G::GeluTanh;
  using Sigmoid = typename G::Sigmoid;
  return {{G::template gated<F, Silu>, G::template gated<B, Silu>, G::template gated<H, Silu>},
          {G::template gated<F, Gelu>, G::template gated<B, Gelu>, G::template gated<H, Gelu>},
          {G::template gated<F, GeluTanh>, G::template gated<B, GeluTanh>, G::template gated<H, GeluTanh>},
          {G::template gated<F, Sigmoid>, G::template gated<B, Sigmoid>, G::template gated<H, Sigmoid>},
          {G::template row_sigmoid<F>, G::template row_sigmoid<B>, G::template row_sigmoid<H>},
          {G::template add_scaled<F>, G::template add_scaled<B>, G::template add_scaled<H>}};
}
