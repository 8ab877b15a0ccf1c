// Weights of the next token (sampling.h), compiled once per instruction set after elements-inl.h and rows-inl.h (exp).

template <class Ops>
struct Sampling {
  using All = Elements<Ops>;
  using Vec = typename Ops::Vec;
  using F32 = AsF32<Ops>;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr int kChains = 4;  // maximums that do not wait for each other

  // NaN counts as less than everything.
  static float largest(const float* numbers, int count) {
    const float none = -__builtin_inff();
    Vec best[kChains];
    for (Vec& one : best) one = Ops::set(none);
    int i = 0;
    for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
      for (int c = 0; c < kChains; ++c) best[c] = Ops::max(Ops::load(numbers + i + c * kLanes), best[c]);
    }
    float result = none;
    for (const Vec one : best) {
      float lanes[kLanes];
      Ops::store(lanes, one);
      for (const float lane : lanes) result = lane > result ? lane : result;
    }
    for (; i < count; ++i) result = numbers[i] > result ? numbers[i] : result;
    return result;
  }

  static void weigh(const float* logits, float* weights, int count, float temperature) {
    const Vec top = Ops::set(largest(logits, count)), divisor = Ops::set(temperature), least = Ops::set(-140.0f);
    All::for_vectors(count, [&](int i, auto extent) {
      const Vec below = Ops::div(Ops::sub(load<F32>(logits + i, extent), top), divisor);
      // The second operand where one is NaN.
      store<F32>(Rows<Ops>::exp(Ops::max(least, below)), weights + i, extent);
    });
  }
};

template <class Ops>
constexpr kt::SamplingKernels make_sampling_kernels() {
  return {Sampling<Ops>::weigh};
}
