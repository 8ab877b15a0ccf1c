// Rows of fp32, bf16 or fp16, computed in fp32: what the kernels of SGLang's operators share (norms-inl.h, heads-inl.h,
// router-inl.h, gates-inl.h).
//
// Vectors start at multiples of kLanes of a row, the last one may be a part. Sums have kSums partial sums, column c in
// partial sum c % kSums, and one order of adding those up: the same bits on every instruction set, whatever stands in
// the rows beside.

// An element type: how it is stored, and vectors from and to fp32.
template <class Ops>
struct AsF32 {
  using Stored = float;
  using Vec = typename Ops::Vec;
  static inline Vec load(const float* p) { return Ops::load(p); }
  static inline void store(Vec v, float* p) { Ops::store(p, v); }
  static inline Vec round(Vec v) { return v; }
};
template <class Ops>
struct AsBf16 {
  using Stored = uint16_t;
  using Vec = typename Ops::Vec;
  static inline Vec load(const uint16_t* p) { return Ops::from_bf16(p); }
  static inline void store(Vec v, uint16_t* p) { Ops::to_bf16(v, p); }
  static inline Vec round(Vec v) { return Ops::round_bf16(v); }
};
template <class Ops>
struct AsF16 {
  using Stored = uint16_t;
  using Vec = typename Ops::Vec;
  static inline Vec load(const uint16_t* p) { return Ops::from_f16(p); }
  static inline void store(Vec v, uint16_t* p) { Ops::to_f16(v, p); }
  static inline Vec round(Vec v) {
    uint16_t bits[Ops::kLanes];
    Ops::to_f16(v, bits);
    return Ops::from_f16(bits);
  }
};

// How much of a vector there is.
struct Whole {};
struct Part {
  int count;
};

template <class E>
static inline __attribute__((always_inline)) auto load(const typename E::Stored* p, Whole) {
  return E::load(p);
}
template <class E>
static inline auto load(const typename E::Stored* p, Part part) {
  typename E::Stored padded[64 / sizeof(float)] = {};
  __builtin_memcpy(padded, p, part.count * sizeof(padded[0]));
  return E::load(padded);
}
template <class E>
static inline __attribute__((always_inline)) void store(typename E::Vec v, typename E::Stored* p, Whole) {
  E::store(v, p);
}
template <class E>
static inline void store(typename E::Vec v, typename E::Stored* p, Part part) {
  typename E::Stored padded[64 / sizeof(float)];
  E::store(v, padded);
  __builtin_memcpy(p, padded, part.count * sizeof(padded[0]));
}

template <class Ops>
struct Elements {
  using Vec = typename Ops::Vec;
  using F32 = AsF32<Ops>;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kSums = 32;
  static constexpr int kSumVecs = kSums / kLanes;

  // step(i, Whole{} or Part{...}) for the vectors of `columns` columns.
  template <class Step>
  static inline __attribute__((always_inline)) void for_vectors(int columns, Step step) {
    int i = 0;
    for (; i + kLanes <= columns; i += kLanes) step(i, Whole{});
    if (i < columns) step(i, Part{columns - i});
  }

  // Sum over the columns of value(i, extent), whose lanes beyond a part must be 0.
  template <class Value>
  static inline __attribute__((always_inline)) float sum(int columns, Value value) {
    Vec sums[kSumVecs];
    for (int v = 0; v < kSumVecs; ++v) sums[v] = Ops::zero();
    int i = 0;
    for (; i + kSums <= columns; i += kSums) {
      for (int v = 0; v < kSumVecs; ++v) sums[v] = Ops::add(sums[v], value(i + v * kLanes, Whole{}));
    }
    for (int v = 0; v < kSumVecs; ++v) {
      const int first = i + v * kLanes;
      if (first + kLanes <= columns) {
        sums[v] = Ops::add(sums[v], value(first, Whole{}));
      } else if (first < columns) {
        sums[v] = Ops::add(sums[v], value(first, Part{columns - first}));
      }
    }
    float lanes[kSums];
    for (int v = 0; v < kSumVecs; ++v) Ops::store(lanes + v * kLanes, sums[v]);
    for (int half = kSums / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    return lanes[0];
  }

  static inline Vec square(Vec v) { return Ops::mul(v, v); }

  template <class E>
  static void widen(const void* from, float* to, int columns) {
    const auto* f = static_cast<const typename E::Stored*>(from);
    for_vectors(columns, [&](int i, auto extent) { store<F32>(load<E>(f + i, extent), to + i, extent); });
  }
};
