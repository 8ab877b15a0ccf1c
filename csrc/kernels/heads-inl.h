// Norm and rotation of heads (heads.h), compiled once per instruction set after elements-inl.h. A head is widened to
// fp32 once, normed and turned there, and rounded once. Products of a rotation round by themselves, as in torch.

template <class Ops>
struct Heads {
  using All = Elements<Ops>;
  using Vec = typename Ops::Vec;
  using F32 = AsF32<Ops>;

  template <class C>
  static void halves_angles(const void* row, int rotary, kt::Angles* angles) {
    const int half = rotary / 2;
    const auto* cos = static_cast<const typename C::Stored*>(row);
    angles->rotary = rotary;
    All::template widen<C>(cos, angles->cos, half);
    All::template widen<C>(cos + half, angles->sin + half, half);
    for (int i = 0; i < half; ++i) {
      angles->cos[half + i] = angles->cos[i];
      angles->sin[i] = -angles->sin[half + i];
    }
  }

  template <class C>
  static void pairs_angles(const void* row, int rotary, kt::Angles* angles) {
    const int half = rotary / 2;
    const auto* cos = static_cast<const typename C::Stored*>(row);
    angles->rotary = rotary;
    float wide[kt::kLargestHead];
    All::template widen<C>(cos, wide, rotary);
    for (int i = 0; i < half; ++i) {
      angles->cos[2 * i] = angles->cos[2 * i + 1] = wide[i];
      angles->sin[2 * i] = -wide[half + i];
      angles->sin[2 * i + 1] = wide[half + i];
    }
  }

  struct Halves {
    static inline void turn(const float* x, const kt::Angles& a, float* y) {
      const int half = a.rotary / 2;
      for (int begin = 0; begin < a.rotary; begin += half) {
        const float* partner = x + (begin == 0 ? half : 0);
        All::for_vectors(half, [&](int i, auto extent) {
          const Vec own = Ops::mul(load<F32>(x + begin + i, extent), load<F32>(a.cos + begin + i, extent));
          const Vec other = Ops::mul(load<F32>(partner + i, extent), load<F32>(a.sin + begin + i, extent));
          store<F32>(Ops::add(own, other), y + begin + i, extent);
        });
      }
    }
  };

  struct Pairs {
    static inline void turn(const float* x, const kt::Angles& a, float* y) {
      All::for_vectors(a.rotary, [&](int i, auto extent) {
        const Vec v = load<F32>(x + i, extent);
        const Vec own = Ops::mul(v, load<F32>(a.cos + i, extent));
        const Vec other = Ops::mul(Ops::swap_pairs(v), load<F32>(a.sin + i, extent));
        store<F32>(Ops::add(own, other), y + i, extent);
      });
    }
  };

  template <class X>
  static inline void load_head(const kt::HeadArgs& a, const typename X::Stored* x, float* wide) {
    if (a.weight == nullptr) {
      All::template widen<X>(x, wide, a.columns);
      return;
    }
    const float squares = All::sum(a.columns, [&](int i, auto extent) {
      const Vec v = load<X>(x + i, extent);
      store<F32>(v, wide + i, extent);
      return All::square(v);
    });
    const Vec scale = Ops::set(1.0f / __builtin_sqrtf(squares / static_cast<float>(a.columns) + a.eps));
    All::for_vectors(a.columns, [&](int i, auto extent) {
      const Vec v = Ops::mul(load<F32>(wide + i, extent), scale);
      store<F32>(Ops::mul(v, load<F32>(a.weight + i, extent)), wide + i, extent);
    });
  }

  template <class X, class Order>
  static void turn(const kt::HeadArgs& a) {
    for (int h = 0; h < a.heads; ++h) {
      const auto* x = reinterpret_cast<const typename X::Stored*>(a.x + h * a.x_stride);
      auto* y = reinterpret_cast<typename X::Stored*>(a.y + h * a.y_stride);
      float wide[kt::kLargestHead], turned[kt::kLargestHead];
      load_head<X>(a, x, wide);
      Order::turn(wide, *a.angles, turned);
      const int rotary = a.angles->rotary;
      All::for_vectors(rotary, [&](int i, auto extent) { store<X>(load<F32>(turned + i, extent), y + i, extent); });
      All::for_vectors(a.columns - rotary, [&](int i, auto extent) {
        store<X>(load<F32>(wide + rotary + i, extent), y + rotary + i, extent);
      });
    }
  }
};

template <class Ops>
constexpr kt::HeadKernels make_head_kernels() {
  using H = Heads<Ops>;
  using All = Elements<Ops>;
  using F32 = AsF32<Ops>;
  using B = AsBf16<Ops>;
  using F16 = AsF16<Ops>;
  using Halves = typename H::Halves;
  using Pairs = typename H::Pairs;
  return {{H::template halves_angles<F32>, H::template halves_angles<B>, H::template halves_angles<F16>},
          {H::template pairs_angles<F32>, H::template pairs_angles<B>, H::template pairs_angles<F16>},
          {H::template turn<F32, Halves>, H::template turn<B, Halves>, H::template turn<F16, Halves>},
          {H::template turn<F32, Pairs>, H::template turn<B, Pairs>, H::template turn<F16, Pairs>},
          {All::template widen<F32>, All::template widen<B>, All::template widen<F16>}};
}
