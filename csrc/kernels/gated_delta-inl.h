// The kernels of gated_delta.h over one instruction set's vectors (ops-inl.h) and rows-inl.h.
//
// A state block is [keys][kDeltaColumns]: one key's row of values is a few vectors, so that the reading (k S), the
// writing (S + k^T delta) and the query (q S) are multiply-adds of a row by one number. Sums over keys are kept in
// kReading (kWriting) parts, by the key's number modulo that, added at the end: enough of them to hide the latency.

// How activations of a type are read and written.
template <class Ops>
struct AsF32 {
  using Element = float;
  static inline typename Ops::Vec load(const float* p) { return Ops::load(p); }
  static inline void store(typename Ops::Vec v, float* p) { Ops::store(p, v); }
};
template <class Ops>
struct AsBf16 {
  using Element = uint16_t;
  static inline typename Ops::Vec load(const uint16_t* p) { return Ops::from_bf16(p); }
  static inline void store(typename Ops::Vec v, uint16_t* p) { Ops::to_bf16(v, p); }
};
template <class Ops>
struct AsF16 {
  using Element = uint16_t;
  static inline typename Ops::Vec load(const uint16_t* p) { return Ops::from_f16(p); }
  static inline void store(typename Ops::Vec v, uint16_t* p) { Ops::to_f16(v, p); }
};

template <class Ops, template <class> class Type>
struct GatedDelta {
  using Vec = typename Ops::Vec;
  using As = Type<Ops>;
  using Element = typename As::Element;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kVecs = kt::kDeltaColumns / kLanes;
  static constexpr int kReading = 8 / kVecs;
  static constexpr int kWriting = kVecs >= 4 ? 1 : 4 / kVecs;

  // The last, partial vector of a row goes through a padded copy.
  static inline Vec load_part(const Element* p, int count) {
    if (count >= kLanes) return As::load(p);
    Element padded[kLanes] = {};
    __builtin_memcpy(padded, p, count * sizeof(Element));
    return As::load(padded);
  }
  static inline void store_part(Vec v, Element* p, int count) {
    if (count >= kLanes) return As::store(v, p);
    Element padded[kLanes];
    As::store(v, padded);
    __builtin_memcpy(p, padded, count * sizeof(Element));
  }

  static inline float sum_of_lanes(Vec v) {
    float lanes[kLanes];
    Ops::store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }

  // `row` at unit length, times `scale`, with zeros up to a multiple of kLanes.
  static inline void normalised(const Element* row, int count, float epsilon, float scale, float* to) {
    Vec squares = Ops::zero();
    for (int i = 0; i < count; i += kLanes) {
      const Vec x = load_part(row + i, count - i);
      Ops::store(to + i, x);
      squares = Ops::fma(x, x, squares);
    }
    const Vec factor = Ops::set(scale / __builtin_sqrtf(sum_of_lanes(squares) + epsilon));
    for (int i = 0; i < count; i += kLanes) Ops::store(to + i, Ops::mul(Ops::load(to + i), factor));
  }

  // What the state, decayed, says of the key; -> what is to be written for it.
  static inline __attribute__((always_inline)) void differences(const float* state, int keys, const float* k,
                                                                const Vec (&v)[kVecs], float decay, float beta,
                                                                Vec (&delta)[kVecs]) {
    Vec sums[kReading][kVecs];
    for (auto& part : sums) {
      for (Vec& sum : part) sum = Ops::zero();
    }
    for (int i = 0; i < keys; i += kReading) {
#pragma GCC unroll 4
      for (int part = 0; part < kReading; ++part) {
        const Vec key = Ops::set(k[i + part]);
        const float* row = state + (i + part) * kt::kDeltaColumns;
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) sums[part][j] = Ops::fma(Ops::load(row + j * kLanes), key, sums[part][j]);
      }
    }
    for (int j = 0; j < kVecs; ++j) {
      Vec sum = sums[0][j];
      for (int part = 1; part < kReading; ++part) sum = Ops::add(sum, sums[part][j]);
      delta[j] = Ops::mul(Ops::set(beta), Ops::sub(v[j], Ops::mul(Ops::set(decay), sum)));
    }
  }

  // Decays the state, writes `delta` at the key, and asks the result with the query.
  static inline __attribute__((always_inline)) void write_and_ask(float* state, int keys, const float* k,
                                                                  const float* q, const Vec (&delta)[kVecs],
                                                                  float decay, Vec (&answer)[kVecs]) {
    Vec sums[kWriting][kVecs];
    for (auto& part : sums) {
      for (Vec& sum : part) sum = Ops::zero();
    }
    const Vec decays = Ops::set(decay);
    for (int i = 0; i < keys; i += kWriting) {
#pragma GCC unroll 4
      for (int part = 0; part < kWriting; ++part) {
        const Vec key = Ops::set(k[i + part]);
        const Vec query = Ops::set(q[i + part]);
        float* row = state + (i + part) * kt::kDeltaColumns;
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) {
          const Vec s = Ops::fma(key, delta[j], Ops::mul(decays, Ops::load(row + j * kLanes)));
          Ops::store(row + j * kLanes, s);
          sums[part][j] = Ops::fma(query, s, sums[part][j]);
        }
      }
    }
    for (int j = 0; j < kVecs; ++j) {
      answer[j] = sums[0][j];
      for (int part = 1; part < kWriting; ++part) answer[j] = Ops::add(answer[j], sums[part][j]);
    }
  }

  static void delta_rule(const kt::DeltaRuleArgs& s) {
    static_assert(kReading <= 4 && kWriting <= 4);
    alignas(64) float q[kt::kMostDeltaKeys + kLanes], k[kt::kMostDeltaKeys + kLanes];
    const int keys = (s.keys + 3) / 4 * 4;
    for (int t = 0; t < s.tokens; ++t) {
      normalised(static_cast<const Element*>(s.q) + t * s.q_stride, s.keys, s.norm_epsilon, s.query_scale, q);
      normalised(static_cast<const Element*>(s.k) + t * s.k_stride, s.keys, s.norm_epsilon, 1.0f, k);
      const Element* values = static_cast<const Element*>(s.v) + t * s.v_stride;
      Element* out = static_cast<Element*>(s.out) + t * s.out_stride;
      Vec v[kVecs], delta[kVecs], answer[kVecs];
      for (int j = 0; j < kVecs; ++j) {
        const int left = s.columns - j * kLanes;
        v[j] = left > 0 ? load_part(values + j * kLanes, left) : Ops::zero();
      }
      differences(s.state, keys, k, v, s.decay[t], s.beta[t], delta);
      write_and_ask(s.state, keys, k, q, delta, s.decay[t], answer);
      for (int j = 0; j < kVecs && s.columns > j * kLanes; ++j) {
        store_part(answer[j], out + j * kLanes, s.columns - j * kLanes);
      }
    }
  }

  static inline Vec load_f32_part(const float* p, int count) {
    if (count >= kLanes) return Ops::load(p);
    float padded[kLanes] = {};
    __builtin_memcpy(padded, p, count * sizeof(float));
    return Ops::load(padded);
  }

  static void convolve(const kt::ConvolutionArgs& s) {
    const Element* weight = static_cast<const Element*>(s.weight);
    for (int c = 0; c < s.channels; c += kLanes) {
      const int left = s.channels - c;
      Vec sum = s.bias == nullptr ? Ops::zero() : load_f32_part(s.bias + c, left);
      for (int tap = 0; tap < s.taps; ++tap) {
        if (s.rows[tap] == nullptr) continue;
        const Vec x = tap < s.first_activation ? load_f32_part(static_cast<const float*>(s.rows[tap]) + c, left)
                                               : load_part(static_cast<const Element*>(s.rows[tap]) + c, left);
        sum = Ops::fma(x, load_part(weight + tap * s.weight_stride + c, left), sum);
      }
      if (s.then == kt::AfterConvolution::kSilu) sum = Rows<Ops>::times_sigmoid(sum, Ops::set(1.0f));
      store_part(sum, static_cast<Element*>(s.out) + c, left);
    }
  }

  static void gated_norm(const kt::GatedNormArgs& s) {
    for (int r = 0; r < s.rows; ++r) {
      const Element* x = static_cast<const Element*>(s.x) + r * s.x_stride;
      const Element* gate = static_cast<const Element*>(s.gate) + r * s.gate_stride;
      Element* out = static_cast<Element*>(s.out) + r * s.out_stride;
      Vec squares = Ops::zero();
      for (int c = 0; c < s.columns; c += kLanes) {
        const Vec v = load_part(x + c, s.columns - c);
        squares = Ops::fma(v, v, squares);
      }
      const Vec factor = Ops::set(1.0f / __builtin_sqrtf(sum_of_lanes(squares) / s.columns + s.epsilon));
      for (int c = 0; c < s.columns; c += kLanes) {
        const int left = s.columns - c;
        const Vec normed = Ops::mul(Ops::mul(load_part(x + c, left), factor), load_f32_part(s.weight + c, left));
        const Vec silu = Rows<Ops>::times_sigmoid(load_part(gate + c, left), Ops::set(1.0f));
        store_part(Ops::mul(normed, silu), out + c, left);
      }
    }
  }
};

template <class Ops>
constexpr kt::GatedDeltaKernels make_gated_delta_kernels() {
  using R = Rows<Ops>;
  using F32 = GatedDelta<Ops, AsF32>;
  using Bf16 = GatedDelta<Ops, AsBf16>;
  using F16 = GatedDelta<Ops, AsF16>;
  return {{F32::delta_rule, Bf16::delta_rule, F16::delta_rule},
          {F32::convolve, Bf16::convolve, F16::convolve},
          {F32::gated_norm, Bf16::gated_norm, F16::gated_norm},
          {R::template convert<float, float, Ops::load, Ops::store_to>,
           R::template convert<uint16_t, float, Ops::from_bf16, Ops::store_to>,
           R::template convert<uint16_t, float, Ops::from_f16, Ops::store_to>},
          {R::template convert<float, float, Ops::load, Ops::store_to>,
           R::template convert<float, uint16_t, Ops::load, Ops::to_bf16>,
           R::template convert<float, uint16_t, Ops::load, Ops::to_f16>}};
}
