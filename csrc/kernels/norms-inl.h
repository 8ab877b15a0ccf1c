// RMSNorm and LayerNorm (norms.h), compiled once per instruction set after elements-inl.h. Two passes over a row, which
// stays in L1 or L2 between them: the sum of squares, then the products. Rounded once, at the end.

template <class Ops>
struct Norms {
  using All = Elements<Ops>;
  using Vec = typename Ops::Vec;

  template <class E, class Byte>
  static inline auto row(Byte* rows, int64_t stride, int64_t r) {
    using Stored = typename E::Stored;
    if constexpr (__is_same(Byte, const uint8_t)) {
      return reinterpret_cast<const Stored*>(rows + r * stride);
    } else {
      return reinterpret_cast<Stored*>(rows + r * stride);
    }
  }

  template <class W, class Extent>
  static inline Vec weight(const kt::NormArgs& a, int i, Extent extent) {
    if (a.weight == nullptr) return Ops::set(1.0f);
    const Vec w = load<W>(static_cast<const typename W::Stored*>(a.weight) + i, extent);
    return Ops::add(w, Ops::set(a.weight_offset));
  }

  static inline float inverse_root(float sum, float count, float eps) {
    return 1.0f / __builtin_sqrtf(sum / count + eps);
  }

  template <class X, class W>
  static inline void scale_row(const kt::NormArgs& a, int64_t r, float scale) {
    const auto* x = row<X>(a.x, a.x_stride, r);
    auto* y = row<X>(a.y, a.y_stride, r);
    const Vec s = Ops::set(scale);
    All::for_vectors(a.columns, [&](int i, auto extent) {
      const Vec v = Ops::mul(load<X>(x + i, extent), s);
      store<X>(Ops::mul(v, weight<W>(a, i, extent)), y + i, extent);
    });
  }

  template <class X>
  static float sum_squares(const void* row, int columns) {
    const auto* x = static_cast<const typename X::Stored*>(row);
    return All::sum(columns, [&](int i, auto extent) { return All::square(load<X>(x + i, extent)); });
  }

  template <class X, class W>
  static void rms_norm(const kt::NormArgs& a) {
    for (int64_t r = 0; r < a.rows; ++r) {
      const float sum = sum_squares<X>(a.x + r * a.x_stride, a.columns);
      scale_row<X, W>(a, r, inverse_root(sum, static_cast<float>(a.columns), a.eps));
    }
  }

  template <class X, class W>
  static void scale_rows(const kt::ScaleArgs& a) {
    for (int64_t r = 0; r < a.norm.rows; ++r) {
      float sum;
      __builtin_memcpy(&sum, reinterpret_cast<const uint8_t*>(a.sum_squares) + r * a.sum_squares_stride, sizeof(sum));
      scale_row<X, W>(a.norm, r, inverse_root(sum, a.count, a.norm.eps));
    }
  }

  // The sum as the norm sees it.
  struct Exact {
    template <class X>
    static inline Vec of(Vec sum) {
      return sum;
    }
  };
  struct Rounded {
    template <class X>
    static inline Vec of(Vec sum) {
      return X::round(sum);
    }
  };

  template <class X, class W, class Sum>
  static void add_rms_norm(const kt::NormArgs& a) {
    for (int64_t r = 0; r < a.rows; ++r) {
      const auto* x = row<X>(a.x, a.x_stride, r);
      auto* residual = row<X>(a.residual, a.residual_stride, r);
      auto* y = row<X>(a.y, a.y_stride, r);
      const auto added = [&](int i, auto extent) __attribute__((always_inline)) {
        const Vec sum = Ops::add(load<X>(x + i, extent), load<X>(residual + i, extent));
        return Sum::template of<X>(sum);
      };
      const float squares = All::sum(a.columns, [&](int i, auto extent) { return All::square(added(i, extent)); });
      const Vec s = Ops::set(inverse_root(squares, static_cast<float>(a.columns), a.eps));
      All::for_vectors(a.columns, [&](int i, auto extent) {
        const Vec sum = added(i, extent);
        store<X>(sum, residual + i, extent);
        store<X>(Ops::mul(Ops::mul(sum, s), weight<W>(a, i, extent)), y + i, extent);
      });
    }
  }

  template <class X, class W>
  static void layer_norm(const kt::NormArgs& a) {
    const float count = static_cast<float>(a.columns);
    for (int64_t r = 0; r < a.rows; ++r) {
      const auto* x = row<X>(a.x, a.x_stride, r);
      auto* y = row<X>(a.y, a.y_stride, r);
      const float sum = All::sum(a.columns, [&](int i, auto extent) { return load<X>(x + i, extent); });
      const Vec mean = Ops::set(sum / count);
      // Lanes beyond a part would add the mean's square: they get the mean first.
      const auto centred = [&](int i, auto extent) __attribute__((always_inline)) {
        return keep(Ops::sub(load<X>(x + i, extent), mean), extent);
      };
      const float squares = All::sum(a.columns, [&](int i, auto extent) { return All::square(centred(i, extent)); });
      const Vec s = Ops::set(inverse_root(squares, count, a.eps));
      All::for_vectors(a.columns, [&](int i, auto extent) {
        Vec v = Ops::mul(Ops::mul(centred(i, extent), s), weight<W>(a, i, extent));
        if (a.bias != nullptr) {
          v = Ops::add(v, load<W>(static_cast<const typename W::Stored*>(a.bias) + i, extent));
        }
        store<X>(v, y + i, extent);
      });
    }
  }

  static inline Vec keep(Vec v, Whole) { return v; }
  static inline Vec keep(Vec v, Part part) {
    float lanes[Ops::kLanes];
    Ops::store(lanes, v);
    return load<AsF32<Ops>>(lanes, part);
  }
};

// One definition of the whole set, so that two instruction sets differ in their Ops and nowhere else.
template <class Ops>
constexpr kt::NormKernels make_norm_kernels() {
  using N = Norms<Ops>;
  using F = AsF32<Ops>;
  using B = AsBf16<Ops>;
  using H = AsF16<Ops>;
  using Exact = typename N::Exact;
  using Rounded = typename N::Rounded;
  return {{{N::template rms_norm<F, F>, N::template rms_norm<F, B>, N::template rms_norm<F, H>},
           {N::template rms_norm<B, F>, N::template rms_norm<B, B>, N::template rms_norm<B, H>},
           {N::template rms_norm<H, F>, N::template rms_norm<H, B>, N::template rms_norm<H, H>}},
          {{N::template add_rms_norm<F, F, Exact>, N::template add_rms_norm<F, B, Exact>,
            N::template add_rms_norm<F, H, Exact>},
           {N::template add_rms_norm<B, F, Exact>, N::template add_rms_norm<B, B, Exact>,
            N::template add_rms_norm<B, H, Exact>},
           {N::template add_rms_norm<H, F, Exact>, N::template add_rms_norm<H, B, Exact>,
            N::template add_rms_norm<H, H, Exact>}},
          {{N::template add_rms_norm<F, F, Rounded>, N::template add_rms_norm<F, B, Rounded>,
            N::template add_rms_norm<F, H, Rounded>},
           {N::template add_rms_norm<B, F, Rounded>, N::template add_rms_norm<B, B, Rounded>,
            N::template add_rms_norm<B, H, Rounded>},
           {N::template add_rms_norm<H, F, Rounded>, N::template add_rms_norm<H, B, Rounded>,
            N::template add_rms_norm<H, H, Rounded>}},
          {{N::template layer_norm<F, F>, N::template layer_norm<F, B>, N::template layer_norm<F, H>},
           {N::template layer_norm<B, F>, N::template layer_norm<B, B>, N::template layer_norm<B, H>},
           {N::template layer_norm<H, F>, N::template layer_norm<H, B>, N::template layer_norm<H, H>}},
          {{N::template scale_rows<F, F>, N::template scale_rows<F, B>, N::template scale_rows<F, H>},
           {N::template scale_rows<B, F>, N::template scale_rows<B, B>, N::template scale_rows<B, H>},
           {N::template scale_rows<H, F>, N::template scale_rows<H, B>, N::template scale_rows<H, H>}},
          {N::template sum_squares<F>, N::template sum_squares<B>, N::template sum_squares<H>}};
}
